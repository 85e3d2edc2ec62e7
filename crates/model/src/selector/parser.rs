//! From text to tree (L-8 to L-12), with a stack of its own instead of recursion.

use super::ParseError;
use super::ast::{Join, Node, Test, Tree};
use super::lexer::{Cursor, Operand, Operator};
use crate::names::Name;

/// Deepest nesting of brackets. The API's limit of 1024 characters allows 509; data written straight to
/// the datastore is not checked, so more than this is a parse error rather than memory without bound.
pub(super) const MAX_DEPTH: usize = 1024;

/// An and- or or-expression that is being read.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Index of its node, a placeholder that is dropped at the end if there is only one operand.
    node: usize,
    operands: usize,
}

/// Nodes as they are read, with placeholders.
#[derive(Debug, Default)]
struct Builder {
    nodes: Vec<Node>,
    /// For every level of brackets its or-expression and the current and-expression in it.
    levels: Vec<(Open, Open)>,
    n_placeholders: usize,
}

/// Parses a whole text; nothing but blanks is `all()`.
pub(super) fn parse(text: &str) -> Result<Tree, ParseError> {
    let mut cursor = Cursor::new(text);
    cursor.skip_blanks();
    if cursor.at_end() {
        return Ok(Tree::new(vec![Node::All]));
    }
    let mut builder = Builder::default();
    builder.open_level();
    loop {
        read_operand(&mut cursor, &mut builder)?;
        // Closing brackets complete operands of the level around them.
        loop {
            cursor.skip_blanks();
            if cursor.eat("&&") {
                builder.next_in_and();
                break;
            }
            if cursor.eat("||") {
                builder.next_in_or();
                break;
            }
            let outermost = builder.levels.len() <= 1;
            if cursor.at_end() {
                if !outermost {
                    return Err(cursor.error("missing `)`"));
                }
                builder.close_level();
                return Ok(Tree::new(builder.without_placeholders()));
            }
            if outermost {
                return Err(cursor.error("expected `&&`, `||` or the end"));
            }
            if !cursor.eat(")") {
                return Err(cursor.error("expected `&&`, `||` or `)`"));
            }
            builder.close_level();
        }
    }
}

/// Reads negations and brackets down to the next single operation.
fn read_operand(cursor: &mut Cursor<'_>, builder: &mut Builder) -> Result<(), ParseError> {
    loop {
        if cursor.negation() {
            builder.nodes.push(Node::Not);
        }
        let node = match cursor.operand()? {
            Operand::Open => {
                if builder.levels.len() > MAX_DEPTH {
                    return Err(cursor.error("brackets nested too deeply"));
                }
                builder.open_level();
                continue;
            }
            Operand::All => Node::All,
            Operand::Global => Node::Global,
            Operand::Has(label) => Node::Has(label.into()),
            Operand::Label(label) => {
                let test = read_test(cursor)?;
                Node::Test { label: label.into(), test }
            }
        };
        builder.nodes.push(node);
        return Ok(());
    }
}

fn read_test(cursor: &mut Cursor<'_>) -> Result<Test, ParseError> {
    Ok(match cursor.operator()? {
        Operator::Equals => Test::Equals(read_value(cursor)?),
        Operator::NotEquals => Test::NotEquals(read_value(cursor)?),
        Operator::Contains => Test::Contains(read_value(cursor)?),
        Operator::StartsWith => Test::StartsWith(read_value(cursor)?),
        Operator::EndsWith => Test::EndsWith(read_value(cursor)?),
        Operator::In => Test::In(read_set(cursor)?),
        Operator::NotIn => Test::NotIn(read_set(cursor)?),
    })
}

fn read_value(cursor: &mut Cursor<'_>) -> Result<Name, ParseError> {
    match cursor.string()? {
        Some(value) => Ok(value.into()),
        None => Err(cursor.error("expected a quoted value")),
    }
}

/// Reads a set: it may be empty and may end with one comma (L-10).
fn read_set(cursor: &mut Cursor<'_>) -> Result<Box<[Name]>, ParseError> {
    cursor.skip_blanks();
    if !cursor.eat("{") {
        return Err(cursor.error("expected `{`"));
    }
    let mut values: Vec<Name> = Vec::new();
    while let Some(value) = cursor.string()? {
        values.push(value.into());
        cursor.skip_blanks();
        if !cursor.eat(",") {
            break;
        }
    }
    cursor.skip_blanks();
    if !cursor.eat("}") {
        return Err(cursor.error("expected `}` or a quoted value"));
    }
    values.sort_unstable();
    values.dedup();
    Ok(values.into_boxed_slice())
}

impl Builder {
    fn open_level(&mut self) {
        let or = self.open(Join::Or);
        let and = self.open(Join::And);
        self.levels.push((or, and));
    }

    fn open(&mut self, join: Join) -> Open {
        let node = self.nodes.len();
        // The end is filled in when it is known.
        self.nodes.push(Node::Group { join, end: 0 });
        Open { node, operands: 1 }
    }

    fn next_in_and(&mut self) {
        if let Some((_, and)) = self.levels.last_mut() {
            and.operands += 1;
        }
    }

    fn next_in_or(&mut self) {
        if let Some((mut or, and)) = self.levels.pop() {
            self.close(and);
            or.operands += 1;
            let and = self.open(Join::And);
            self.levels.push((or, and));
        }
    }

    fn close_level(&mut self) {
        if let Some((or, and)) = self.levels.pop() {
            self.close(and);
            self.close(or);
        }
    }

    /// Fills in where a group ends; 0 marks a placeholder for a single operand.
    fn close(&mut self, open: Open) {
        let here = self.nodes.len();
        if open.operands < 2 {
            self.n_placeholders += 1;
        } else if let Some(Node::Group { end, .. }) = self.nodes.get_mut(open.node) {
            *end = here;
        }
    }

    /// Drops the placeholders and moves the ends of groups accordingly.
    fn without_placeholders(mut self) -> Vec<Node> {
        // `kept[i]` is the number of nodes before index `i` that stay.
        let mut kept = Vec::with_capacity(self.nodes.len() + 1);
        let mut n_kept = 0;
        kept.push(0);
        for node in &self.nodes {
            n_kept += usize::from(!is_placeholder(node));
            kept.push(n_kept);
        }
        debug_assert_eq!(n_kept + self.n_placeholders, self.nodes.len());
        self.nodes.retain_mut(|node| {
            if is_placeholder(node) {
                return false;
            }
            if let Node::Group { end, .. } = node {
                *end = kept.get(*end).copied().unwrap_or(n_kept);
            }
            true
        });
        self.nodes
    }
}

fn is_placeholder(node: &Node) -> bool {
    matches!(node, Node::Group { end: 0, .. })
}
