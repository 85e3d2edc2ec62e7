//! From text to tree (L-8 to L-12), with a stack of its own instead of recursion.

use super::ParseError;
use super::ast::{self, Item, Join, Test, Tree};
use super::lexer::{Cursor, Operand, Operator};

/// Deepest nesting of brackets. The API's limit of 1024 characters allows 509; data written straight to
/// the datastore is not checked, so more than this is a parse error rather than memory without bound.
pub(super) const MAX_DEPTH: usize = 1024;

/// Longest text. What is stored in etcd is far shorter, and the extents in a tree have a limit.
pub(super) const MAX_LENGTH: usize = 16 << 20;

/// An and- or or-expression that is being read.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Index of its item, a placeholder that is dropped at the end if there is only one operand.
    item: usize,
    operands: usize,
}

/// A tree as it is read, with placeholders.
#[derive(Debug, Default)]
struct Builder {
    tree: ast::Builder,
    /// For every level of brackets its or-expression and the current and-expression in it.
    levels: Vec<(Open, Open)>,
    n_placeholders: usize,
}

/// Parses a whole text; nothing but blanks is `all()`.
pub(super) fn parse(text: &str) -> Result<Tree, ParseError> {
    let mut cursor = Cursor::new(text);
    if text.len() > MAX_LENGTH {
        return Err(cursor.error("longer than 16 MiB"));
    }
    cursor.skip_blanks();
    if cursor.at_end() {
        return Ok(Tree::all());
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
                return Ok(builder.without_placeholders().build());
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
            builder.tree.items.push(Item::Not);
        }
        match cursor.operand()? {
            Operand::Open => {
                if builder.levels.len() > MAX_DEPTH {
                    return Err(cursor.error("brackets nested too deeply"));
                }
                builder.open_level();
                continue;
            }
            Operand::All => builder.tree.push_all(),
            Operand::Global => builder.tree.push_global(),
            Operand::Has(label) => builder.tree.push_has(label),
            Operand::Label(label) => read_test(cursor, label, &mut builder.tree)?,
        }
        return Ok(());
    }
}

fn read_test(cursor: &mut Cursor<'_>, label: &str, tree: &mut ast::Builder) -> Result<(), ParseError> {
    let test: fn(_) -> _ = match cursor.operator()? {
        Operator::Equals => Test::Equals,
        Operator::NotEquals => Test::NotEquals,
        Operator::Contains => Test::Contains,
        Operator::StartsWith => Test::StartsWith,
        Operator::EndsWith => Test::EndsWith,
        operator @ (Operator::In | Operator::NotIn) => {
            tree.push_set(label, operator == Operator::NotIn, read_set(cursor)?);
            return Ok(());
        }
    };
    tree.push_test(label, test(read_value(cursor)?));
    Ok(())
}

fn read_value<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, ParseError> {
    match cursor.string()? {
        Some(value) => Ok(value),
        None => Err(cursor.error("expected a quoted value")),
    }
}

/// Reads a set: it may be empty and may end with one comma (L-10).
fn read_set<'a>(cursor: &mut Cursor<'a>) -> Result<Vec<&'a str>, ParseError> {
    cursor.skip_blanks();
    if !cursor.eat("{") {
        return Err(cursor.error("expected `{`"));
    }
    let mut values = Vec::new();
    while let Some(value) = cursor.string()? {
        values.push(value);
        cursor.skip_blanks();
        if !cursor.eat(",") {
            break;
        }
    }
    cursor.skip_blanks();
    if !cursor.eat("}") {
        return Err(cursor.error("expected `}` or a quoted value"));
    }
    Ok(values)
}

impl Builder {
    fn open_level(&mut self) {
        let or = self.open(Join::Or);
        let and = self.open(Join::And);
        self.levels.push((or, and));
    }

    fn open(&mut self, join: Join) -> Open {
        let item = self.tree.items.len();
        // The end is filled in when it is known.
        self.tree.items.push(Item::Group { join, end: 0 });
        Open { item, operands: 1 }
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
        let here = self.tree.items.len();
        if open.operands < 2 {
            self.n_placeholders += 1;
        } else if let Some(Item::Group { end, .. }) = self.tree.items.get_mut(open.item) {
            *end = here;
        }
    }

    /// Drops the placeholders and moves the ends of groups accordingly.
    fn without_placeholders(mut self) -> ast::Builder {
        // `kept[i]` is the number of items before index `i` that stay.
        let mut kept = Vec::with_capacity(self.tree.items.len() + 1);
        let mut n_kept = 0;
        kept.push(0);
        for item in &self.tree.items {
            n_kept += usize::from(!is_placeholder(item));
            kept.push(n_kept);
        }
        debug_assert_eq!(n_kept + self.n_placeholders, self.tree.items.len());
        self.tree.items.retain_mut(|item| {
            if is_placeholder(item) {
                return false;
            }
            if let Item::Group { end, .. } = item {
                *end = kept.get(*end).copied().unwrap_or(n_kept);
            }
            true
        });
        self.tree
    }
}

const fn is_placeholder(item: &Item) -> bool {
    matches!(item, Item::Group { end: 0, .. })
}
