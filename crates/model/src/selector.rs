//! The selector language (policy.md section 1).
//!
//! Fed by [`crate::convert`] with the texts of policies and rules, used by the graph to find out which
//! endpoints and network sets are meant, and source of the names of IP sets.
//!
//! Invariant: whatever the text, neither parsing, printing, evaluating nor dropping panics or needs
//! stack in proportion to the nesting (L-12).

mod ast;
mod eval;
mod lexer;
mod parser;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::OnceLock;

use crate::names::SetId;
pub use ast::{Join, Node, Reader, Test, Values};

/// A parsed selector. Equality is equality of canonical texts, which is that of trees.
///
/// There are as many of these as there are policies; hence one packed tree and no text beside it.
#[derive(Clone)]
pub struct Selector {
    tree: ast::Tree,
    /// Computed when first asked for: selectors of policies never name a set.
    id: OnceLock<Box<SetId>>,
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
    ///
    /// # Errors
    ///
    /// Says what was expected and where, if the text is not a selector (L-13).
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parser::parse(text).map(Self::from_tree)
    }

    /// The selector `all()`.
    #[must_use]
    pub fn all() -> Self {
        Self::from_tree(ast::Tree::all())
    }

    const fn from_tree(tree: ast::Tree) -> Self {
        Self { tree, id: OnceLock::new() }
    }

    /// Returns the canonical text (L-20).
    pub fn canonical(&self) -> String {
        self.tree.print("")
    }

    /// The id of its set, computed from the tree of the original text (L-23, L-31).
    pub fn id(&self) -> &SetId {
        self.id.get_or_init(|| Box::new(SetId::for_selector(&self.canonical())))
    }

    /// Evaluates the selector (L-14 to L-17).
    pub fn matches(&self, labels: &(impl LabelSource + ?Sized)) -> bool {
        eval::matches(&self.tree, labels)
    }

    /// The parts of the selector, for those who evaluate it in a form of their own.
    pub fn reader(&self) -> Reader<'_> {
        self.tree.reader()
    }

    /// Returns the canonical text with `prefix` before every label name (L-33).
    pub fn prefixed(&self, prefix: &str) -> String {
        self.tree.print(prefix)
    }

    /// Returns the selector of the text `!(self)`.
    ///
    /// Unlike parsing a text made from [`Self::canonical`], this keeps nested negations as they were
    /// written, and with them the id (L-23).
    #[must_use]
    pub fn negated(&self) -> Self {
        Self::from_tree(self.tree.negated())
    }

    /// Returns the selector of the text `(self) && (other)`; see [`Self::negated`] for why not by text.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self::from_tree(self.tree.and(&other.tree))
    }
}

/// Returns the normalised text of a selector (L-24): trimmed, and canonical if it parses.
pub fn normalise(text: &str) -> String {
    let text = text.trim();
    match Selector::parse(text) {
        Ok(selector) => selector.canonical(),
        Err(_) => text.to_owned(),
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.tree == other.tree
    }
}

impl Eq for Selector {}

impl Hash for Selector {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tree.hash(state);
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical())
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical())
    }
}

#[cfg(test)]
mod tests;
