//! Tables, chains and hooks.

use std::fmt;
use std::sync::Arc;

use model::Family;

use crate::rule::Rule;

/// A table of the packet filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    Raw,
    Mangle,
    Nat,
    Filter,
}

impl Table {
    pub const ALL: [Self; 4] = [Self::Raw, Self::Mangle, Self::Nat, Self::Filter];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }
}

/// One table of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId {
    pub family: Family,
    pub table: Table,
}

/// A chain that the kernel makes and everybody shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseChain {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl BaseChain {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }
}

/// Name of a chain of ours: 1 to 28 bytes, which is what both iptables variants take.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainName(Arc<str>);

impl ChainName {
    /// Longest chain name in bytes (netfilter.md 3.2).
    pub const MAX: usize = 28;

    /// Returns `None` for a name that the kernel would not take: empty, longer than [`Self::MAX`],
    /// or with blanks, control characters or quotes in it.
    pub fn new(name: &str) -> Option<Self> {
        let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\'');
        (!name.is_empty() && name.len() <= Self::MAX && plain).then(|| Self(name.into()))
    }

    /// Takes a name that is known to be good, for instance a word of the program; what [`Self::new`]
    /// would refuse in it becomes `_`, and it is cut. Text from outside goes through a hash first.
    pub fn fixed(name: &str) -> Self {
        Self::new(name).unwrap_or_else(|| {
            let plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '\'';
            let cut: String = name.chars().take(Self::MAX).map(|c| if plain(c) { c } else { '_' }).collect();
            Self(if cut.is_empty() { "_".into() } else { cut.into() })
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A chain of ours with its complete contents.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub name: ChainName,
    pub rules: Vec<Rule>,
}

impl Chain {
    /// The chains that the rules jump or go to, in order, with repeats.
    pub fn targets(&self) -> impl Iterator<Item = &ChainName> {
        self.rules.iter().filter_map(Rule::target)
    }
}

/// Our rules in one base chain (netfilter.md 5.1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hooks {
    /// At the top of the chain, or at its end with `ChainInsertMode=append`.
    pub inserts: Vec<Rule>,
    /// Always at the end, after the inserts.
    pub appends: Vec<Rule>,
}
