//! The selector language (policy.md section 1).

use std::fmt;

use crate::names::SetId;

/// A parsed selector. Equality is equality of canonical texts.
#[derive(Clone)]
pub struct Selector {
    id: SetId,
    canonical: Box<str>,
}

/// Why a text is not a selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} at byte {at}")]
pub struct ParseError {
    pub message: &'static str,
    pub at: usize,
}

/// Where a selector finds the labels it asks for (with inheritance, policy.md B-1).
pub trait LabelSource {
    fn label(&self, name: &str) -> Option<&str>;
}

impl Selector {
    /// Parses a selector; the empty text is `all()`.
    pub fn parse(_text: &str) -> Result<Self, ParseError> {
        unimplemented!()
    }

    /// The canonical text (L-20).
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// The id of its set, computed from the tree of the original text (L-23, L-31).
    pub fn id(&self) -> &SetId {
        &self.id
    }

    /// Evaluates the selector (L-14 to L-17).
    pub fn matches(&self, _labels: &impl LabelSource) -> bool {
        unimplemented!()
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical)
    }
}
