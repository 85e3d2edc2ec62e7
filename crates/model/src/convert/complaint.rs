//! What is wrong with a stored document, in the words of whoever has to put it right.

use std::fmt;

/// A document can hold tens of thousands of bad rules; this many tell enough.
const MAX_COMPLAINTS: usize = 20;

/// One defect of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Path of the field, such as `spec.ingress[3].destination.ports`; empty for the document itself.
    pub field: String,
    pub reason: String,
    pub effect: Effect,
}

/// What a defect led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// The record is treated as absent.
    Rejected,
    /// An allow, pass or log rule does not exist.
    RuleLeftOut,
    /// A deny rule lacks a match and denies more than is written.
    RuleWidened,
    /// Nobody inherits the labels of a profile; its rules apply (H-8).
    LabelsIgnored,
    /// A part is not there, without effect on the rest.
    PartIgnored,
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rejected => "treated as absent",
            Self::RuleLeftOut => "rule left out",
            Self::RuleWidened => "rule denies more than written",
            Self::LabelsIgnored => "labels of the profile are not inherited",
            Self::PartIgnored => "ignored",
        })
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, reason, effect } = self;
        if field.is_empty() { write!(f, "{reason} ({effect})") } else { write!(f, "{field}: {reason} ({effect})") }
    }
}

/// A place in a document. Costs nothing until it is printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a>(Option<(&'a At<'a>, Step)>);

#[derive(Clone, Copy, Debug)]
enum Step {
    Field(&'static str),
    Index(usize),
}

impl<'a> At<'a> {
    pub(super) const fn root() -> At<'static> {
        At(None)
    }

    pub(super) const fn field(&'a self, name: &'static str) -> At<'a> {
        At(Some((self, Step::Field(name))))
    }

    pub(super) const fn index(&'a self, index: usize) -> At<'a> {
        At(Some((self, Step::Index(index))))
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => Ok(()),
            Some((parent, Step::Index(index))) => write!(f, "{parent}[{index}]"),
            Some((At(None), Step::Field(name))) => f.write_str(name),
            Some((parent, Step::Field(name))) => write!(f, "{parent}.{name}"),
        }
    }
}

/// Collects complaints and remembers whether one of them costs the record its life.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    list: Vec<Complaint>,
    n_more: usize,
    rejected: bool,
}

impl Complaints {
    pub(super) fn reject(&mut self, at: At<'_>, reason: impl fmt::Display) {
        self.rejected = true;
        self.add(at, reason, Effect::Rejected);
    }

    pub(super) fn add(&mut self, at: At<'_>, reason: impl fmt::Display, effect: Effect) {
        if self.list.len() < MAX_COMPLAINTS {
            self.list.push(Complaint { field: at.to_string(), reason: reason.to_string(), effect });
        } else {
            self.n_more += 1;
        }
    }

    /// Returns the record, unless it was rejected.
    pub(super) fn unless_rejected<T>(&self, record: T) -> Option<T> {
        (!self.rejected).then_some(record)
    }

    pub(super) fn into_list(mut self) -> Vec<Complaint> {
        if self.n_more > 0 {
            let effect = if self.rejected { Effect::Rejected } else { Effect::PartIgnored };
            let reason = format!("{} further defects are not listed", self.n_more);
            self.list.push(Complaint { field: String::new(), reason, effect });
        }
        self.list
    }
}
