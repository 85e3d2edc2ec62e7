//! Selectors as short byte strings that speak of labels by number.
//!
//! A selector is compiled when it is registered; evaluating it then compares numbers, and only
//! `contains`, `starts with` and `ends with` read a text. Selectors that differ only in how they are
//! written may compile to the same program, which is what they are filed and counted as.
//!
//! Law: *evaluate(compile(selector), labels) = selector.matches(labels)*; with labels of which some are
//! unknown, the answer is the one that all completions have in common, or `None`.
//! Every program holds a use of each key and label that it names.

use std::collections::{BTreeMap, BTreeSet};

use model::Selector;
use model::selector::{Join, Node, Test};
use smallvec::SmallVec;

use crate::labels::Term;
use crate::names::{Label, Names};

const NOT: u8 = 0;
/// Followed by the position behind the last operand.
const AND: u8 = 1;
const OR: u8 = 2;
const TRUE: u8 = 3;
/// Followed by a key.
const HAS: u8 = 4;
/// Followed by a key and a label.
const IS: u8 = 5;
/// Followed by a key, a count and as many labels, sorted.
const IN: u8 = 6;
/// Followed by a key, a length and as many bytes.
const CONTAINS: u8 = 7;
const STARTS: u8 = 8;
const ENDS: u8 = 9;

/// One element of a program; operators come before their operands.
#[derive(Clone, Copy, Debug)]
enum Op<'a> {
    Not,
    /// All of the operands (or one of them) that lie before `end`.
    Group {
        all: bool,
        end: usize,
    },
    True,
    Has(u32),
    Is(Label),
    In {
        key: u32,
        labels: &'a [[u8; 4]],
    },
    Text {
        key: u32,
        how: u8,
        part: &'a [u8],
    },
}

/// Reads a program from front to back.
#[derive(Clone, Copy, Debug)]
struct Reader<'a> {
    program: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    const fn new(program: &'a [u8]) -> Self {
        Self { program, at: 0 }
    }

    fn number(&mut self) -> Option<u32> {
        let bytes = self.program.get(self.at..)?.first_chunk::<4>()?;
        self.at += 4;
        Some(u32::from_le_bytes(*bytes))
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let bytes = self.program.get(self.at..)?.get(..length)?;
        self.at += length;
        Some(bytes)
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Op<'a>;

    fn next(&mut self) -> Option<Op<'a>> {
        let code = *self.program.get(self.at)?;
        self.at += 1;
        Some(match code {
            NOT => Op::Not,
            AND | OR => Op::Group { all: code == AND, end: self.number()? as usize },
            TRUE => Op::True,
            HAS => Op::Has(self.number()?),
            IS => Op::Is(Label { key: self.number()?, label: self.number()? }),
            IN => {
                let (key, count) = (self.number()?, self.number()? as usize);
                let (labels, _) = self.bytes(count * 4)?.as_chunks::<4>();
                Op::In { key, labels }
            }
            _ => {
                let (key, length) = (self.number()?, self.number()? as usize);
                Op::Text { key, how: code, part: self.bytes(length)? }
            }
        })
    }
}

/// Compiles a selector into `program`, which is empty.
pub(super) fn compile(names: &mut Names, selector: &Selector, program: &mut Vec<u8>) {
    // (position of the node behind a group, where its end has to be written)
    let mut open: SmallVec<[(usize, usize); 8]> = SmallVec::new();
    let push = |program: &mut Vec<u8>, number: u32| program.extend(number.to_le_bytes());
    let mut reader = selector.reader();
    loop {
        let position = reader.position();
        while let Some((_, at)) = open.last().copied().filter(|(end, _)| *end <= position) {
            open.pop();
            set_end(program, at);
        }
        let Some(node) = reader.next() else { break };
        match node {
            Node::Not => program.push(NOT),
            Node::Group { join, end } => {
                program.push(if join == Join::And { AND } else { OR });
                open.push((end, program.len()));
                push(program, 0);
            }
            Node::All | Node::Global => program.push(TRUE),
            Node::Has(key) => {
                program.push(HAS);
                push(program, names.acquire(key));
            }
            Node::Test { label, test } => {
                let key = names.acquire(label);
                match test {
                    Test::Equals(value) | Test::NotEquals(value) => {
                        if matches!(test, Test::NotEquals(_)) {
                            program.push(NOT);
                        }
                        program.push(IS);
                        push(program, key);
                        push(program, names.acquire_label(key, value));
                    }
                    Test::In(values) | Test::NotIn(values) => {
                        if matches!(test, Test::NotIn(_)) {
                            program.push(NOT);
                        }
                        let mut labels: Vec<u32> = values.iter().map(|value| names.acquire_label(key, value)).collect();
                        labels.sort_unstable();
                        program.push(IN);
                        push(program, key);
                        push(program, labels.len() as u32);
                        labels.into_iter().for_each(|label| push(program, label));
                    }
                    Test::Contains(part) | Test::StartsWith(part) | Test::EndsWith(part) => {
                        let is_start = matches!(test, Test::StartsWith(_));
                        let is_end = matches!(test, Test::EndsWith(_));
                        program.push(if is_start {
                            STARTS
                        } else if is_end {
                            ENDS
                        } else {
                            CONTAINS
                        });
                        push(program, key);
                        push(program, part.len() as u32);
                        program.extend(part.bytes());
                    }
                }
            }
        }
    }
}

fn set_end(program: &mut [u8], at: usize) {
    // No selector has four gigabytes.
    let end = (program.len() as u32).to_le_bytes();
    if let Some(place) = program.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = end;
    }
}

/// Gives back the uses that a program holds.
pub(super) fn release(names: &mut Names, program: &[u8]) {
    for op in Reader::new(program) {
        match op {
            Op::Not | Op::Group { .. } | Op::True => (),
            Op::Has(key) | Op::Text { key, .. } => names.release(key),
            Op::Is(Label { key, label }) => {
                names.release_label(label);
                names.release(key);
            }
            Op::In { key, labels } => {
                labels.iter().for_each(|label| names.release_label(u32::from_le_bytes(*label)));
                names.release(key);
            }
        }
    }
}

/// What is known of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Label(u32),
    Missing,
    Unknown,
}

/// An operator whose operand is being evaluated.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Not,
    Group { all: bool, end: usize, unknown: bool },
}

/// Evaluates a program for labels sorted by key (L-14 to L-17); `may_have` tells whether a key that is
/// not among them may be there all the same. `None`: it depends on such a key.
pub(super) fn evaluate(
    names: &Names,
    program: &[u8],
    labels: &[Label],
    may_have: impl Fn(u32) -> bool,
) -> Option<bool> {
    let find = |key: u32| match labels.binary_search_by_key(&key, |label| label.key) {
        Ok(at) => labels.get(at).map_or(Found::Missing, |label| Found::Label(label.label)),
        Err(_) if may_have(key) => Found::Unknown,
        Err(_) => Found::Missing,
    };
    let test = |key: u32, is: &dyn Fn(u32) -> bool| match find(key) {
        Found::Label(label) => Some(is(label)),
        Found::Missing => Some(false),
        Found::Unknown => None,
    };
    let mut pending: SmallVec<[Pending; 8]> = SmallVec::new();
    let mut reader = Reader::new(program);
    let mut value = Some(false);
    while let Some(op) = reader.next() {
        value = match op {
            Op::Not => {
                pending.push(Pending::Not);
                continue;
            }
            Op::Group { all, end } => {
                pending.push(Pending::Group { all, end, unknown: false });
                continue;
            }
            Op::True => Some(true),
            Op::Has(key) => test(key, &|_| true),
            Op::Is(wanted) => test(wanted.key, &|label| label == wanted.label),
            Op::In { key, labels } => {
                test(key, &|label| labels.binary_search_by_key(&label, |known| u32::from_le_bytes(*known)).is_ok())
            }
            Op::Text { key, how, part } => test(key, &|label| {
                // The part was a string when it was compiled.
                let (text, part) = (names.value_of(label), std::str::from_utf8(part).unwrap_or_default());
                match how {
                    CONTAINS => text.contains(part),
                    STARTS => text.starts_with(part),
                    _ => text.ends_with(part),
                }
            }),
        };
        // `value` is that of a whole operand; give it to the operators waiting for it.
        while let Some(operator) = pending.last_mut() {
            match operator {
                Pending::Not => value = value.map(|value| !value),
                Pending::Group { all, end, unknown } => {
                    *unknown |= value.is_none();
                    let decided = value == Some(!*all);
                    if !decided && reader.at < *end {
                        break;
                    }
                    if !decided {
                        value = (!*unknown).then_some(*all);
                    }
                    reader.at = *end;
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

/// What must hold for one label (L-40).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Restriction {
    Absent,
    Present,
    /// Present and one of these labels; never empty.
    OneOf(BTreeSet<u32>),
}

/// By key: what every match satisfies; `None` if there are no matches.
type Restrictions = Option<BTreeMap<u32, Restriction>>;

/// What a selector asks for: every element is a list of alternatives, at least one of which every match
/// has, and no match has two of one list. `None` if there are no matches.
pub(super) fn choices(program: &[u8]) -> Option<Vec<SmallVec<[Term; 1]>>> {
    let terms = |(key, restriction): (u32, Restriction)| match restriction {
        Restriction::Absent => None,
        Restriction::Present => Some(SmallVec::from_iter([Term::any_value(key)])),
        Restriction::OneOf(labels) => Some(labels.into_iter().map(Term::label).collect()),
    };
    Some(restrictions(program)?.into_iter().filter_map(terms).collect())
}

/// An operator and what its operands so far restrict.
#[derive(Debug)]
enum Open {
    Not,
    Group { all: bool, end: usize, so_far: Option<Restrictions> },
}

/// Derives what a program restricts. Nothing follows from `!=`, `not in` and negated groups.
///
/// Law: every object that the selector matches satisfies all of it. The converse does not hold.
fn restrictions(program: &[u8]) -> Restrictions {
    let one = |key: u32, restriction: Restriction| Some(BTreeMap::from([(key, restriction)]));
    let nothing_known = || Some(BTreeMap::new());
    let mut pending: SmallVec<[Open; 4]> = SmallVec::new();
    let mut reader = Reader::new(program);
    let mut result = nothing_known();
    while let Some(op) = reader.next() {
        // The only negation that says something is that of a single `has` or constant.
        let negated = matches!(pending.last(), Some(Open::Not));
        result = match op {
            Op::Not => {
                pending.push(Open::Not);
                continue;
            }
            Op::Group { all, end } => {
                pending.push(Open::Group { all, end, so_far: None });
                continue;
            }
            Op::True if negated => None,
            Op::True => nothing_known(),
            Op::Has(key) => one(key, if negated { Restriction::Absent } else { Restriction::Present }),
            Op::Is(_) | Op::In { .. } | Op::Text { .. } if negated => nothing_known(),
            Op::Is(Label { key, label }) => one(key, Restriction::OneOf(BTreeSet::from([label]))),
            Op::In { labels: [], .. } => None,
            Op::In { key, labels } => {
                one(key, Restriction::OneOf(labels.iter().map(|label| u32::from_le_bytes(*label)).collect()))
            }
            Op::Text { key, .. } => one(key, Restriction::Present),
        };
        if negated {
            pending.pop();
        }
        // The operand is complete; give what it says to the operators around it.
        while let Some(operator) = pending.pop() {
            match operator {
                Open::Not => result = nothing_known(),
                Open::Group { all, end, so_far } => {
                    let joined = match so_far {
                        None => result,
                        Some(so_far) if all => both(so_far, result),
                        Some(so_far) => either(so_far, result),
                    };
                    if reader.at < end {
                        pending.push(Open::Group { all, end, so_far: Some(joined) });
                        result = nothing_known();
                        break;
                    }
                    result = joined;
                }
            }
        }
    }
    result
}

fn both(a: Restrictions, b: Restrictions) -> Restrictions {
    let (a, b) = (a?, b?);
    // Into the larger of the two, so that deep nesting stays linear.
    let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
    for (key, restriction) in small {
        let restriction = match large.remove(&key) {
            None => restriction,
            Some(other) => other.and(restriction)?,
        };
        large.insert(key, restriction);
    }
    Some(large)
}

fn either(a: Restrictions, b: Restrictions) -> Restrictions {
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (None, other) | (other, None) => return other,
    };
    let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
    let in_both = |(key, restriction)| Some((key, large.remove(&key)?.or(restriction)?));
    Some(small.into_iter().filter_map(in_both).collect())
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
                let both: BTreeSet<u32> = small.into_iter().filter(|label| large.contains(label)).collect();
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

#[cfg(test)]
mod tests;
