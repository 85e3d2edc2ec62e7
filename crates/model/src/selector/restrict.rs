//! What a selector says about single labels (L-40), for indexes that look only at likely candidates.
//!
//! Law: every object that a selector matches satisfies all of its restrictions. The converse does not
//! hold. Nothing is derived from `!=`, `not in` and negated groups.

use std::collections::{BTreeMap, BTreeSet};

use super::ast::{Join, Node, Test, Tree};
use crate::names::Name;

/// What must hold for an object to be matched at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restrictions {
    /// The selector matches nothing, for instance `a in {}`.
    MatchesNothing,
    /// All of these must hold; none at all for a selector such as `all()`.
    Labels(BTreeMap<Name, Restriction>),
}

/// What must hold for one label, inheritance included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restriction {
    Absent,
    Present,
    /// Present with one of these values; never empty.
    OneOf(BTreeSet<Name>),
}

/// An operator and what its operands so far restrict.
#[derive(Debug)]
enum Pending {
    Not,
    Group { join: Join, end: usize, so_far: Option<Restrictions> },
}

/// Derives the restrictions of a selector.
pub(super) fn restrictions(tree: &Tree) -> Restrictions {
    let mut pending: Vec<Pending> = Vec::new();
    let mut result = Restrictions::none();
    let mut reader = tree.reader();
    while let Some(node) = reader.next() {
        // The only negation that says something is that of a single `has` or constant.
        let negated = matches!(pending.last(), Some(Pending::Not));
        result = match node {
            Node::Not => {
                pending.push(Pending::Not);
                continue;
            }
            Node::Group { join, end } => {
                pending.push(Pending::Group { join, end, so_far: None });
                continue;
            }
            Node::All | Node::Global if negated => Restrictions::MatchesNothing,
            Node::All | Node::Global => Restrictions::none(),
            Node::Has(label) => {
                Restrictions::one(label, if negated { Restriction::Absent } else { Restriction::Present })
            }
            Node::Test { .. } if negated => Restrictions::none(),
            Node::Test { label, test } => test.restricts(label),
        };
        if negated {
            pending.pop();
        }
        // The operand is complete; give what it says to the operators around it.
        while let Some(operator) = pending.pop() {
            match operator {
                Pending::Not => result = Restrictions::none(),
                Pending::Group { join, end, so_far } => {
                    let joined = match (join, so_far) {
                        (_, None) => result,
                        (Join::And, Some(so_far)) => so_far.and(result),
                        (Join::Or, Some(so_far)) => so_far.or(result),
                    };
                    if reader.position() < end {
                        pending.push(Pending::Group { join, end, so_far: Some(joined) });
                        result = Restrictions::none();
                        break;
                    }
                    result = joined;
                }
            }
        }
    }
    result
}

impl Test<'_> {
    fn restricts(&self, label: &str) -> Restrictions {
        match self {
            Self::Equals(value) => Restrictions::one(label, Restriction::OneOf([Name::from(*value)].into())),
            Self::In(values) if values.is_empty() => Restrictions::MatchesNothing,
            Self::In(values) => Restrictions::one(label, Restriction::OneOf(values.iter().map(Name::from).collect())),
            Self::Contains(_) | Self::StartsWith(_) | Self::EndsWith(_) => {
                Restrictions::one(label, Restriction::Present)
            }
            Self::NotEquals(_) | Self::NotIn(_) => Restrictions::none(),
        }
    }
}

impl Restrictions {
    const fn none() -> Self {
        Self::Labels(BTreeMap::new())
    }

    fn one(label: &str, restriction: Restriction) -> Self {
        Self::Labels(BTreeMap::from([(label.into(), restriction)]))
    }

    /// Both hold.
    fn and(self, other: Self) -> Self {
        let (Self::Labels(a), Self::Labels(b)) = (self, other) else { return Self::MatchesNothing };
        // Into the larger of the two, so that deep nesting stays linear.
        let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
        for (label, restriction) in small {
            let restriction = match large.remove(&label) {
                None => restriction,
                Some(other) => match other.and(restriction) {
                    Some(both) => both,
                    None => return Self::MatchesNothing,
                },
            };
            large.insert(label, restriction);
        }
        Self::Labels(large)
    }

    /// At least one of the two holds.
    fn or(self, other: Self) -> Self {
        let (a, b) = match (self, other) {
            (Self::MatchesNothing, other) | (other, Self::MatchesNothing) => return other,
            (Self::Labels(a), Self::Labels(b)) => (a, b),
        };
        let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
        let mut both = BTreeMap::new();
        for (label, restriction) in small {
            if let Some(either) = large.remove(&label).and_then(|other| other.or(restriction)) {
                both.insert(label, either);
            }
        }
        Self::Labels(both)
    }
}

impl Restriction {
    /// `None`: no value satisfies both.
    fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Absent, Self::Absent) => Some(Self::Absent),
            (Self::Absent, Self::Present | Self::OneOf(_)) | (Self::Present | Self::OneOf(_), Self::Absent) => None,
            (Self::Present, stronger) | (stronger, Self::Present) => Some(stronger),
            (Self::OneOf(a), Self::OneOf(b)) => {
                let (large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
                let both: BTreeSet<Name> = small.into_iter().filter(|value| large.contains(value)).collect();
                (!both.is_empty()).then_some(Self::OneOf(both))
            }
        }
    }

    /// `None`: nothing is known about the label.
    fn or(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Absent, Self::Absent) => Some(Self::Absent),
            (Self::Absent, Self::Present | Self::OneOf(_)) | (Self::Present | Self::OneOf(_), Self::Absent) => None,
            (Self::Present, Self::Present | Self::OneOf(_)) | (Self::OneOf(_), Self::Present) => Some(Self::Present),
            (Self::OneOf(a), Self::OneOf(b)) => {
                let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
                // One by one: `append` would walk the large set for every alternative.
                large.extend(small);
                Some(Self::OneOf(large))
            }
        }
    }
}
