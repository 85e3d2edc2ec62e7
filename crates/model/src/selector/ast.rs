//! The tree of a selector, packed into one string.
//!
//! Nodes lie one after the other in the order in which they are printed: a group comes before its
//! operands and knows how long they are. Nothing here is recursive, so neither dropping, printing nor
//! evaluating a hostile selector can exhaust the stack (L-12), and a selector is one allocation.
//!
//! A node is a letter and what belongs to it; numbers are written in characters below 128, so that the
//! whole is text and its parts need not be checked again. Extents are relative: a tree can be put into
//! another one as it is.
//!
//! Invariants: the text holds exactly one complete tree; every group has at least two operands; equal
//! trees are equal texts, and equal texts print alike.

/// A packed tree. Built by `parser`, read by `eval` and, through [`Reader`], by the graph.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Tree(Box<str>);

/// One element of a selector.
#[derive(Clone, Copy, Debug)]
pub enum Node<'a> {
    /// Negates the operand that follows.
    Not,
    /// Joins the operands up to the position `end`.
    Group {
        join: Join,
        end: usize,
    },
    All,
    Global,
    Has(&'a str),
    Test {
        label: &'a str,
        test: Test<'a>,
    },
}

/// How the operands of a group are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    And,
    Or,
}

/// What is asked of the value of a label.
#[derive(Clone, Copy, Debug)]
pub enum Test<'a> {
    Equals(&'a str),
    NotEquals(&'a str),
    Contains(&'a str),
    StartsWith(&'a str),
    EndsWith(&'a str),
    In(Values<'a>),
    NotIn(Values<'a>),
}

/// Values of a set: sorted by byte value, without duplicates.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    /// A number for each value: where it ends in `text`.
    ends: &'a str,
    text: &'a str,
}

/// Reads the nodes of a tree in order, operators before their operands.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    text: &'a str,
    at: usize,
}

/// What a tree is packed from.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub(super) items: Vec<Item>,
    /// Packed operands.
    operands: String,
}

/// One element of a tree that is being built.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item {
    Not,
    /// Joins the operands between this item and the index `end`.
    Group {
        join: Join,
        end: usize,
    },
    /// Where it begins and ends among the packed ones.
    Operand(usize, usize),
}

const NOT: char = '!';
const AND: char = '&';
const OR: char = '|';
const ALL: char = 'a';
const GLOBAL: char = 'g';
const HAS: char = 'h';

/// Characters of a number that has a fixed place.
const WIDTH: usize = 4;
/// Characters of a group before its operands.
const GROUP: usize = 1 + WIDTH;

impl Tree {
    /// The tree of `all()`.
    pub(super) fn all() -> Self {
        Self(ALL.to_string().into_boxed_str())
    }

    #[cfg(test)]
    pub(super) const fn packed_len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { text: &self.0, at: 0 }
    }

    /// Returns the tree of `!self`.
    pub(super) fn negated(&self) -> Self {
        let mut text = String::with_capacity(1 + self.0.len());
        text.push(NOT);
        text.push_str(&self.0);
        Self(text.into_boxed_str())
    }

    /// Returns the tree of `self && other`; groups inside the operands stay as they are (L-22).
    pub(super) fn and(&self, other: &Self) -> Self {
        let inside = self.0.len() + other.0.len();
        let mut text = String::with_capacity(GROUP + inside);
        text.push(AND);
        push_fixed(&mut text, inside);
        text.push_str(&self.0);
        text.push_str(&other.0);
        Self(text.into_boxed_str())
    }

    /// Returns the canonical text (L-20 to L-22), with `prefix` before every label name (L-33).
    pub(super) fn print(&self, prefix: &str) -> String {
        let mut out = String::with_capacity(self.0.len() + 16);
        let mut open: Vec<(Join, usize)> = Vec::new();
        let mut reader = self.reader();
        while let Some(node) = reader.next() {
            match node {
                Node::Not => {
                    out.push('!');
                    continue;
                }
                Node::Group { join, end } => {
                    out.push('(');
                    open.push((join, end));
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
            while open.last().is_some_and(|(_, end)| *end == reader.position()) {
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

// === impl Builder ===

impl Builder {
    pub(super) fn push_all(&mut self) {
        self.operand(|text| text.push(ALL));
    }

    pub(super) fn push_global(&mut self) {
        self.operand(|text| text.push(GLOBAL));
    }

    pub(super) fn push_has(&mut self, label: &str) {
        self.operand(|text| {
            text.push(HAS);
            push_text(text, label);
        });
    }

    /// Adds a test of one value.
    pub(super) fn push_test(&mut self, label: &str, test: Test<'_>) {
        let (letter, value) = match test {
            Test::Equals(value) => ('=', value),
            Test::NotEquals(value) => ('#', value),
            Test::Contains(value) => ('c', value),
            Test::StartsWith(value) => ('s', value),
            Test::EndsWith(value) => ('e', value),
            Test::In(_) | Test::NotIn(_) => {
                debug_assert!(false, "a set is not one value");
                return;
            }
        };
        self.operand(|text| {
            text.push(letter);
            push_text(text, label);
            push_text(text, value);
        });
    }

    /// Adds a test of a set of values, in any order.
    pub(super) fn push_set(&mut self, label: &str, negated: bool, mut values: Vec<&str>) {
        values.sort_unstable();
        values.dedup();
        self.operand(|text| {
            text.push(if negated { 'n' } else { 'i' });
            push_text(text, label);
            push_number(text, values.len());
            let mut end = 0;
            for value in &values {
                end += value.len();
                push_fixed(text, end);
            }
            values.iter().for_each(|value| text.push_str(value));
        });
    }

    fn operand(&mut self, write: impl FnOnce(&mut String)) {
        let start = self.operands.len();
        write(&mut self.operands);
        self.items.push(Item::Operand(start, self.operands.len()));
    }

    /// Packs the items, which must be one complete tree.
    pub(super) fn build(self) -> Tree {
        // `before[i]` is the length of everything before item `i`.
        let mut before = Vec::with_capacity(self.items.len() + 1);
        let mut length = 0;
        before.push(0);
        for item in &self.items {
            length += match item {
                Item::Not => 1,
                Item::Group { .. } => GROUP,
                Item::Operand(start, end) => end - start,
            };
            before.push(length);
        }
        let mut text = String::with_capacity(length);
        for (item, start) in self.items.iter().zip(&before) {
            match *item {
                Item::Not => text.push(NOT),
                Item::Group { join, end } => {
                    text.push(match join {
                        Join::And => AND,
                        Join::Or => OR,
                    });
                    let end = before.get(end).copied().unwrap_or(length);
                    push_fixed(&mut text, end.saturating_sub(start + GROUP));
                }
                Item::Operand(start, end) => text.push_str(self.operands.get(start..end).unwrap_or_default()),
            }
        }
        Tree(text.into_boxed_str())
    }
}

// === impl Reader ===

impl<'a> Reader<'a> {
    /// Where the next node begins.
    pub const fn position(&self) -> usize {
        self.at
    }

    /// Goes on at a position where a node begins, or at the end.
    pub(super) const fn skip_to(&mut self, position: usize) {
        self.at = position;
    }

    /// The next node, in the order of the text.
    #[allow(clippy::should_implement_trait, reason = "whoever reads must also ask for positions, and skip")]
    pub fn next(&mut self) -> Option<Node<'a>> {
        let letter = *self.text.as_bytes().get(self.at)?;
        self.at += 1;
        let letter = char::from(letter);
        let node = match letter {
            NOT => Node::Not,
            AND | OR => {
                let join = if letter == AND { Join::And } else { Join::Or };
                let inside = fixed(self.take(WIDTH)?, 0)?;
                Node::Group { join, end: self.at + inside }
            }
            ALL => Node::All,
            GLOBAL => Node::Global,
            HAS => Node::Has(self.take_text()?),
            _ => {
                let label = self.take_text()?;
                let test = match letter {
                    '=' => Test::Equals(self.take_text()?),
                    '#' => Test::NotEquals(self.take_text()?),
                    'c' => Test::Contains(self.take_text()?),
                    's' => Test::StartsWith(self.take_text()?),
                    'e' => Test::EndsWith(self.take_text()?),
                    'i' => Test::In(self.take_values()?),
                    'n' => Test::NotIn(self.take_values()?),
                    _ => return None,
                };
                Node::Test { label, test }
            }
        };
        Some(node)
    }

    fn take(&mut self, length: usize) -> Option<&'a str> {
        let end = self.at.checked_add(length)?;
        let part = self.text.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn take_number(&mut self) -> Option<usize> {
        let mut number = 0;
        for place in 0..5 {
            let digit = *self.text.as_bytes().get(self.at)?;
            self.at += 1;
            number |= usize::from(digit & 0x3f) << (6 * place);
            if digit & 0x40 == 0 {
                break;
            }
        }
        Some(number)
    }

    fn take_text(&mut self) -> Option<&'a str> {
        let length = self.take_number()?;
        self.take(length)
    }

    fn take_values(&mut self) -> Option<Values<'a>> {
        let count = self.take_number()?;
        let ends = self.take(count.checked_mul(WIDTH)?)?;
        let length = match count.checked_sub(1) {
            Some(last) => fixed(ends, last)?,
            None => 0,
        };
        Some(Values { ends, text: self.take(length)? })
    }
}

// === impl Values ===

impl<'a> Values<'a> {
    pub(super) const fn len(&self) -> usize {
        self.ends.len() / WIDTH
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn get(&self, index: usize) -> Option<&'a str> {
        let start = match index.checked_sub(1) {
            Some(before) => fixed(self.ends, before)?,
            None => 0,
        };
        self.text.get(start..fixed(self.ends, index)?)
    }

    pub fn iter(self) -> impl Iterator<Item = &'a str> {
        (0..self.len()).filter_map(move |index| self.get(index))
    }

    pub(super) fn contains(&self, value: &str) -> bool {
        let (mut first, mut behind) = (0, self.len());
        while first < behind {
            let middle = first + (behind - first) / 2;
            let Some(candidate) = self.get(middle) else { return false };
            match candidate.cmp(value) {
                std::cmp::Ordering::Equal => return true,
                std::cmp::Ordering::Less => first = middle + 1,
                std::cmp::Ordering::Greater => behind = middle,
            }
        }
        false
    }
}

// === Numbers and texts ===

fn push_fixed(text: &mut String, number: usize) {
    debug_assert!(number >> (7 * WIDTH) == 0, "a selector of more than 256 MiB");
    for place in 0..WIDTH {
        text.push(char::from((number >> (7 * place)) as u8 & 0x7f));
    }
}

/// Reads a number of fixed width; `index` counts numbers.
fn fixed(text: &str, index: usize) -> Option<usize> {
    let digits = text.as_bytes().get(index * WIDTH..(index + 1) * WIDTH)?;
    Some(digits.iter().rev().fold(0, |number, digit| number << 7 | usize::from(*digit)))
}

fn push_number(text: &mut String, mut number: usize) {
    while number >= 0x40 {
        text.push(char::from((number & 0x3f) as u8 | 0x40));
        number >>= 6;
    }
    text.push(char::from(number as u8));
}

fn push_text(text: &mut String, part: &str) {
    push_number(text, part.len());
    text.push_str(part);
}

// === Printing ===

impl Test<'_> {
    fn print(&self, out: &mut String) {
        match *self {
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

fn print_set(out: &mut String, operator: &str, values: Values<'_>) {
    let mut before = operator;
    if values.is_empty() {
        out.push_str(before);
    }
    for value in values.iter() {
        print_value(out, before, value);
        before = ", ";
    }
    out.push('}');
}

/// L-21: double quotes, unless the value holds one. A value never holds both kinds.
fn print_value(out: &mut String, before: &str, value: &str) {
    let quote = if value.contains('"') { '\'' } else { '"' };
    out.push_str(before);
    out.push(quote);
    out.push_str(value);
    out.push(quote);
}
