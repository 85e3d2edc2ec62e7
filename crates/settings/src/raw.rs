//! What operators wrote, by source, before anything is interpreted (operations.md 2.1).

use std::collections::BTreeMap;
use std::fmt;

/// Where a value came from; a later source beats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Built in, or computed from the host.
    Default,
    /// FelixConfiguration `default` and ClusterInformation.
    DatastoreGlobal,
    /// A FelixConfiguration whose selector matches this host.
    DatastoreSelector,
    /// FelixConfiguration `node.<host>`.
    DatastoreHost,
    File,
    Environment,
    /// Decided by the program, e.g. because the kernel lacks something.
    Internal,
}

impl Source {
    /// True for sources on this host; the others cannot set local parameters.
    pub const fn is_local(self) -> bool {
        match self {
            Self::DatastoreGlobal | Self::DatastoreSelector | Self::DatastoreHost => false,
            Self::Default | Self::File | Self::Environment | Self::Internal => true,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::DatastoreGlobal => "datastore (global)",
            Self::DatastoreSelector => "datastore (selector)",
            Self::DatastoreHost => "datastore (this host)",
            Self::File => "config file",
            Self::Environment => "environment",
            Self::Internal => "program",
        })
    }
}

/// A raw value with the name as it was spelled.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) spelling: String,
    pub(crate) value: String,
}

/// Raw values of all sources.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Raw {
    /// By source and name in lower case.
    layers: BTreeMap<Source, BTreeMap<String, Entry>>,
}

/// Shows names only: a value may hold a credential (I12).
impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.layers.iter().map(|(source, layer)| (source, layer.keys()))).finish()
    }
}

impl Raw {
    /// Sets one value; what the source said about this name before, in any spelling, is replaced.
    pub fn set(&mut self, source: Source, name: &str, value: &str) {
        let entry = Entry { spelling: name.to_owned(), value: value.to_owned() };
        self.layers.entry(source).or_default().insert(name.to_ascii_lowercase(), entry);
    }

    /// Forgets all that a source said.
    pub fn clear(&mut self, source: Source) {
        self.layers.remove(&source);
    }

    /// The sources from the strongest to the weakest, entries by name.
    pub(crate) fn strongest_first(&self) -> impl Iterator<Item = (Source, &Entry)> {
        self.layers.iter().rev().flat_map(|(source, layer)| layer.values().map(|entry| (*source, entry)))
    }
}
