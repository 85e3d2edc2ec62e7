//! The index that maps selectors to the addresses they select: everything between the objects of the
//! datastore and the members of sets, as one unit.
//!
//! ```text
//! profile labels --+
//! endpoints -------+--> selectors (rules) --> members --> MemberChange, SetContents
//! network sets ----+          ^                  ^
//! needed sets ----------------+------------------+
//! ```
//!
//! [`Graph`](crate::Graph) has one and feeds it; it stands alone so that it can be measured alone
//! (performance.md 2.3).
//!
//! Law: that of `members`.

use std::sync::Arc;

use model::{
    EndpointPort, HostEndpoint, Labels, Name, NetworkSet, Selector, SetId, WorkloadEndpoint, WorkloadEndpointKey,
};

use crate::batch::SetContents;
use crate::labels::{ProfileChange, ProfileLabels};
use crate::members::{Contribution, MemberChange, Members, Nets, ObjectKey};
use crate::names::Names;
use crate::references::SetSource;
use crate::selectors::{MatchDelta, SelectorStats, Selectors, Uncollected};

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct MemberIndex {
    names: Names,
    inherited: ProfileLabels,
    selectors: Selectors,
    members: Members,
    changes: Vec<MemberChange>,
    matches: Vec<MatchDelta>,
    match_count: u64,
}

/// An endpoint or network set on its way into the stages.
struct Object<'a> {
    labels: &'a Labels,
    profiles: &'a [Name],
    nets: Nets,
    ports: &'a [EndpointPort],
}

impl MemberIndex {
    /// Stores an endpoint, or with `None` forgets it.
    pub fn on_endpoint(&mut self, key: &WorkloadEndpointKey, value: Option<&WorkloadEndpoint>) {
        let object = value.map(|value| Object {
            labels: &value.labels,
            profiles: &value.profiles,
            nets: Nets::of_endpoint(value),
            ports: &value.ports,
        });
        self.on_object(&ObjectKey::Endpoint(key), object);
    }

    /// Stores a network set, or with `None` forgets it.
    pub fn on_network_set(&mut self, name: &Name, value: Option<&NetworkSet>) {
        let object = value.map(|value| Object {
            labels: &value.labels,
            profiles: &value.profiles,
            nets: Nets::of_network_set(value),
            ports: &[],
        });
        self.on_object(&ObjectKey::NetworkSet(name), object);
    }

    /// Stores a host endpoint of any host, or with `None` forgets it.
    pub fn on_host_endpoint(&mut self, name: &Name, value: Option<&HostEndpoint>) {
        let object = value.map(|value| Object {
            labels: &value.labels,
            profiles: &value.profiles,
            nets: Nets::of_host_endpoint(value),
            ports: &value.ports,
        });
        self.on_object(&ObjectKey::HostEndpoint(name), object);
    }

    fn on_object(&mut self, key: &ObjectKey<'_>, object: Option<Object<'_>>) {
        let Self { names, inherited, selectors, members, changes, .. } = self;
        // These matches begin and end with the object, which brings and takes its members itself.
        let mut matches = Uncollected::default();
        let contribution = object.map(|Object { labels, profiles, nets, ports }| {
            let class = selectors.join(names, inherited, labels, profiles, &mut matches);
            (class, Contribution { nets, ports })
        });
        let left = members.on_object(names, key, contribution, selectors, changes);
        if let Some(class) = left {
            selectors.leave(names, inherited, class, &mut matches);
        }
        self.match_count += matches.0;
    }

    /// Stores the labels that a profile gives to whoever lists it (policy.md B-2).
    pub fn on_profile_labels(&mut self, name: &Name, value: Option<&Labels>) {
        self.change_profile(name, value, |_, _, _| ());
    }

    /// As [`on_profile_labels`](Self::on_profile_labels); `also` follows the change elsewhere.
    pub(crate) fn change_profile(
        &mut self,
        name: &Name,
        value: Option<&Labels>,
        also: impl FnOnce(&Names, &ProfileLabels, &ProfileChange),
    ) {
        let Self { names, inherited, selectors, members, changes, matches, .. } = self;
        let Some(change) = inherited.set(names, name, value) else { return };
        also(names, inherited, &change);
        selectors.change_profile(names, inherited, &change, matches);
        inherited.settle(names, change);
        self.match_count += matches.len() as u64;
        members.on_matches(matches.drain(..), selectors, changes);
    }

    /// The set with this number is needed from now on: the addresses that a selector selects. Numbers
    /// are the caller's, small and dense.
    pub fn need(&mut self, set: u32, selector: &Arc<Selector>) {
        self.need_source(set, selector.id().clone(), SetSource::Selector(Arc::clone(selector)));
    }

    pub(crate) fn need_source(&mut self, set: u32, id: SetId, source: SetSource) {
        let Self { names, inherited, selectors, members, .. } = self;
        let selector = match &source {
            SetSource::Selector(selector) | SetSource::NamedPort { selector, .. } => Some(selector),
            SetSource::Service | SetSource::ServiceAddresses => None,
        };
        // They concern no set that has been announced.
        let mut matches = Uncollected::default();
        let registered = selector.map(|selector| selectors.register(names, inherited, selector, &mut matches).0);
        self.match_count += matches.0;
        members.on_needed(set, id, source, registered);
    }

    /// The set goes as a whole (policy.md M-35).
    pub fn unneed(&mut self, set: u32) {
        let Self { names, selectors, members, .. } = self;
        if let Some(selector) = members.on_unneeded(set) {
            let mut matches = Uncollected::default();
            selectors.unregister(names, selector, &mut matches);
            self.match_count += matches.0;
        }
    }

    /// Returns the contents of a set; from now on its changes are told (F-8).
    pub fn announce(&mut self, set: u32) -> Option<SetContents> {
        self.members.announce(&self.names, set, &self.selectors)
    }

    /// True if the contents of a set have been asked for.
    pub fn is_announced(&self, set: u32) -> bool {
        self.members.is_announced(set)
    }

    /// The id of a needed set.
    pub fn id_of(&self, set: u32) -> Option<&SetId> {
        self.members.id_of(set)
    }

    /// What changed in announced sets since the last call. Per set and member `Added` and `Removed`
    /// alternate, and what one update adds comes before what it removes (M-31).
    pub fn changes(&mut self) -> impl Iterator<Item = MemberChange> {
        self.changes.drain(..)
    }

    /// Names and labels, for other stages that keep some as numbers.
    pub(crate) fn names(&mut self) -> (&mut Names, &ProfileLabels) {
        (&mut self.names, &self.inherited)
    }

    /// Names, to look at.
    pub(crate) fn known_names(&self) -> &Names {
        &self.names
    }

    /// How many endpoints and network sets there are.
    pub fn objects(&self) -> usize {
        self.members.objects()
    }

    /// How often a selector has started or stopped matching a class of objects.
    pub(crate) fn match_count(&self) -> u64 {
        self.match_count
    }

    pub fn stats(&self) -> SelectorStats {
        self.selectors.stats()
    }

    /// True if nothing is stored and no set is needed.
    pub fn is_empty(&self) -> bool {
        let Self { names, inherited, selectors, members, changes: _, matches: _, match_count: _ } = self;
        names.is_empty() && inherited.is_empty() && selectors.is_empty() && members.is_empty()
    }
}
