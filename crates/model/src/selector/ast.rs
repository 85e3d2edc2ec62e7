//! The tree of a selector, stored flat.
//!
//! Nodes lie in one array in the order in which they are printed: a group comes before its operands and
//! knows where they end. Nothing here is recursive, so neither dropping, printing nor evaluating a
//! hostile selector can exhaust the stack (L-12), and a selector of two terms is one allocation for the
//! tree plus its names.
//!
//! Invariant: the array holds exactly one complete tree; every group has at least two operands.

use std::fmt::Write as _;

use crate::names::Name;

/// A flat tree. Built by `parser`, read by `eval` and `restrict`.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: Box<[Node]>,
}

/// One element of a [`Tree`].
#[derive(Clone, Debug)]
pub(super) enum Node {
    /// Negates the operand that follows.
    Not,
    /// Joins the operands between this node and the index `end`.
    Group {
        join: Join,
        end: usize,
    },
    All,
    Global,
    Has(Name),
    Test {
        label: Name,
        test: Test,
    },
}

/// How the operands of a group are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Join {
    And,
    Or,
}

/// What is asked of the value of a label.
#[derive(Clone, Debug)]
pub(super) enum Test {
    Equals(Name),
    NotEquals(Name),
    Contains(Name),
    StartsWith(Name),
    EndsWith(Name),
    /// Sorted by byte value, without duplicates.
    In(Box<[Name]>),
    /// Sorted by byte value, without duplicates.
    NotIn(Box<[Name]>),
}

impl Tree {
    /// Takes nodes that keep the invariant of the module.
    pub(super) fn new(nodes: Vec<Node>) -> Self {
        Self { nodes: nodes.into_boxed_slice() }
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns the tree of `!self`.
    pub(super) fn negated(&self) -> Self {
        let mut nodes = Vec::with_capacity(self.nodes.len() + 1);
        nodes.push(Node::Not);
        append(&mut nodes, &self.nodes);
        Self::new(nodes)
    }

    /// Returns the tree of `self && other`; groups inside the operands stay as they are (L-22).
    pub(super) fn and(&self, other: &Self) -> Self {
        let end = self.nodes.len() + other.nodes.len() + 1;
        let mut nodes = Vec::with_capacity(end);
        nodes.push(Node::Group { join: Join::And, end });
        append(&mut nodes, &self.nodes);
        append(&mut nodes, &other.nodes);
        Self::new(nodes)
    }

    /// Returns the canonical text (L-20 to L-22), with `prefix` before every label name (L-33).
    pub(super) fn print(&self, prefix: &str) -> String {
        let mut out = String::new();
        let mut open: Vec<(Join, usize)> = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            match node {
                Node::Not => {
                    out.push('!');
                    continue;
                }
                Node::Group { join, end } => {
                    out.push('(');
                    open.push((*join, *end));
                    continue;
                }
                Node::All => out.push_str("all()"),
                Node::Global => out.push_str("global()"),
                Node::Has(label) => {
                    out.push_str("has(");
                    out.push_str(prefix);
                    out.push_str(label);
                    out.push(')');
                }
                Node::Test { label, test } => {
                    out.push_str(prefix);
                    out.push_str(label);
                    test.print(&mut out);
                }
            }
            // An operand is complete, and with it every group that ends here.
            while open.last().is_some_and(|(_, end)| *end == index + 1) {
                open.pop();
                out.push(')');
            }
            match open.last() {
                Some((Join::And, _)) => out.push_str(" && "),
                Some((Join::Or, _)) => out.push_str(" || "),
                None => (),
            }
        }
        out
    }
}

/// Appends a complete tree, moving the ends of its groups to where they now are.
fn append(nodes: &mut Vec<Node>, tree: &[Node]) {
    let shift = nodes.len();
    nodes.extend(tree.iter().cloned().map(|mut node| {
        if let Node::Group { end, .. } = &mut node {
            *end += shift;
        }
        node
    }));
}

impl Test {
    fn print(&self, out: &mut String) {
        match self {
            Self::Equals(value) => print_value(out, " == ", value),
            Self::NotEquals(value) => print_value(out, " != ", value),
            Self::Contains(value) => print_value(out, " contains ", value),
            Self::StartsWith(value) => print_value(out, " starts with ", value),
            Self::EndsWith(value) => print_value(out, " ends with ", value),
            Self::In(values) => print_set(out, " in {", values),
            Self::NotIn(values) => print_set(out, " not in {", values),
        }
    }
}

fn print_set(out: &mut String, operator: &str, values: &[Name]) {
    let mut before = operator;
    if values.is_empty() {
        out.push_str(before);
    }
    for value in values {
        print_value(out, before, value);
        before = ", ";
    }
    out.push('}');
}

/// L-21: double quotes, unless the value holds one. A value never holds both kinds.
fn print_value(out: &mut String, before: &str, value: &str) {
    let quote = if value.contains('"') { '\'' } else { '"' };
    // Writing to a string cannot fail.
    let _infallible = write!(out, "{before}{quote}{value}{quote}");
}
