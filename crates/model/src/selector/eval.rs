//! Evaluation of a selector (L-14 to L-17). Stops at the first operand that decides a group.

use smallvec::SmallVec;

use super::LabelSource;
use super::ast::{Join, Node, Test, Tree};

/// An operator whose operand is being evaluated.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Not,
    Group { join: Join, end: usize },
}

/// Tells whether an object with these labels is selected.
pub(super) fn matches(tree: &Tree, labels: &(impl LabelSource + ?Sized)) -> bool {
    let mut reader = tree.reader();
    // Deeper than this is rare; then the stack moves to the heap.
    let mut pending: SmallVec<[Pending; 8]> = SmallVec::new();
    let mut value = false;
    while let Some(node) = reader.next() {
        value = match node {
            Node::Not => {
                pending.push(Pending::Not);
                continue;
            }
            Node::Group { join, end } => {
                pending.push(Pending::Group { join, end });
                continue;
            }
            Node::All | Node::Global => true,
            Node::Has(label) => labels.label(label).is_some(),
            Node::Test { label, test } => test.matches(labels.label(label)),
        };
        // `value` is that of a whole operand; give it to the operators waiting for it.
        while let Some(operator) = pending.last() {
            match *operator {
                Pending::Not => value = !value,
                Pending::Group { join, end } => {
                    let undecided = value == (join == Join::And);
                    if undecided && reader.position() < end {
                        break;
                    }
                    reader.skip_to(end);
                }
            }
            pending.pop();
        }
        if pending.is_empty() {
            break;
        }
    }
    value
}

impl Test<'_> {
    /// Tests the value of a label, `None` if it is missing.
    fn matches(&self, value: Option<&str>) -> bool {
        match self {
            Self::Equals(wanted) => value == Some(wanted),
            Self::NotEquals(unwanted) => value != Some(unwanted),
            Self::Contains(part) => value.is_some_and(|value| value.contains(part)),
            Self::StartsWith(part) => value.is_some_and(|value| value.starts_with(part)),
            Self::EndsWith(part) => value.is_some_and(|value| value.ends_with(part)),
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
        }
    }
}
