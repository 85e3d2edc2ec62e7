//! One batch of changes on its way to the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{Family, LinkState, Name};

use crate::chain::{BaseChain, Chain, ChainName, Hooks, TableId};
use crate::iface::InterfaceSpec;
use crate::members::Members;
use crate::route::RouteSpec;
use crate::set::{SetName, SetSpec};

/// What the dataplane must do next. Each object appears at most once; a consumer that destructures
/// it stops compiling when a field is added and forgotten.
///
/// The first batch of a process is complete: what it does not name is not wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Number of the graph's batch, from there to the log line of the apply.
    pub seq: u64,
    /// Facts about this host's interfaces, as the graph was told them.
    pub links: BTreeMap<Name, Option<LinkState>>,
    pub sets: BTreeMap<(Family, SetName), SetChange>,
    pub tables: BTreeMap<TableId, TableChanges>,
    /// Wanted workload interfaces by name.
    pub interfaces: BTreeMap<Name, Option<InterfaceSpec>>,
    /// The complete list of routes of one interface; empty means none are wanted.
    pub routes: BTreeMap<(Family, Name), Vec<RouteSpec>>,
}

/// A change of one set.
#[derive(Clone, Debug, PartialEq)]
pub enum SetChange {
    /// The set is wanted with exactly these members.
    Replace { spec: SetSpec, members: Members },
    /// Members come and go; the set was wanted before.
    Delta { added: Members, removed: Members },
    /// The set is no longer wanted.
    Remove,
}

/// Changes of one table. Chains that nothing refers to are not in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableChanges {
    /// New contents, or `None` for a chain that must go.
    pub chains: BTreeMap<ChainName, Option<Arc<Chain>>>,
    /// Complete hooks of the base chains that changed.
    pub hooks: BTreeMap<BaseChain, Hooks>,
}

impl Changes {
    /// True if the batch asks for nothing.
    pub fn is_empty(&self) -> bool {
        let Self { seq: _, links, sets, tables, interfaces, routes } = self;
        links.is_empty() && sets.is_empty() && tables.is_empty() && interfaces.is_empty() && routes.is_empty()
    }
}
