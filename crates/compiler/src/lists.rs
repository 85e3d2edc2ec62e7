//! Jump lists of endpoints, each once.
//!
//! The graph gives endpoints to which the same policies apply the same list of tiers. What such a list is
//! jumped to by is found out once and kept as long as an endpoint has it.
//!
//! Invariant: an entry is held by exactly the endpoints whose program has its tiers, and keeps these
//! alive, so that their place in memory identifies them.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use graph::TierProgram;
use program::ChainName;

use crate::endpoint::{Groups, WorkloadLists};

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Lists {
    by_place: HashMap<usize, Entry, RandomState>,
}

#[derive(Debug)]
struct Entry {
    tiers: Arc<[TierProgram]>,
    lists: WorkloadLists,
    holders: usize,
}

impl Lists {
    /// Counts one endpoint that has these tiers. Returns what its chains jump to, and the groups in it if
    /// it is the first.
    pub(crate) fn hold(&mut self, tiers: &Arc<[TierProgram]>) -> (&WorkloadLists, Groups) {
        let new = || Entry { tiers: Arc::clone(tiers), lists: WorkloadLists::of(tiers), holders: 0 };
        let entry = self.by_place.entry(place(tiers)).or_insert_with(new);
        entry.holders += 1;
        let groups = if entry.holders == 1 { entry.lists.groups().cloned().collect() } else { Groups::new() };
        (&entry.lists, groups)
    }

    /// Gives up what one endpoint held; returns the groups that it was the last to need.
    pub(crate) fn release(&mut self, tiers: &Arc<[TierProgram]>) -> Vec<ChainName> {
        let place = place(tiers);
        let Some(entry) = self.by_place.get_mut(&place) else { return Vec::new() };
        debug_assert!(Arc::ptr_eq(&entry.tiers, tiers), "two lists in one place");
        entry.holders = entry.holders.saturating_sub(1);
        if entry.holders > 0 {
            return Vec::new();
        }
        let groups = entry.lists.groups().map(|(name, _)| name.clone()).collect();
        self.by_place.remove(&place);
        groups
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.by_place.is_empty()
    }
}

fn place(tiers: &Arc<[TierProgram]>) -> usize {
    Arc::as_ptr(tiers).addr()
}

#[cfg(test)]
mod tests {
    use graph::PolicyRef;
    use model::{PolicyKey, PolicyKind};

    use super::*;

    /// A list with one group of two policies.
    fn tiers() -> Arc<[TierProgram]> {
        let policy = |name: &str| PolicyRef {
            key: PolicyKey { kind: PolicyKind::GlobalNetworkPolicy, namespace: "".into(), name: name.into() },
            original_selector: "all()".into(),
        };
        let ingress = vec![policy("a"), policy("b")];
        Arc::new([TierProgram { name: "default".into(), ingress, egress: Vec::new(), default_pass: false }])
    }

    #[test]
    fn the_groups_of_a_list_come_with_its_first_endpoint_and_go_with_its_last() {
        let (mut lists, shared, other) = (Lists::default(), tiers(), tiers());
        let names = |groups: &Groups| groups.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let first = names(&lists.hold(&shared).1);
        assert_eq!(first.len(), 1);
        assert_eq!(lists.hold(&shared).1, []);
        // Equal, but not the same: it counts for itself.
        assert_eq!(names(&lists.hold(&other).1), first);
        assert_eq!(lists.hold(&shared).1, []);
        assert_eq!(lists.release(&shared), []);
        assert_eq!(lists.release(&shared), []);
        assert_eq!(lists.release(&shared), first);
        assert_eq!(lists.release(&shared), [], "nobody holds it any more");
        assert_eq!(names(&lists.hold(&shared).1), first);
        assert_eq!(lists.release(&shared), first);
        assert_eq!(lists.release(&other), first);
        assert!(lists.is_empty());
    }
}
