//! Which local endpoint owns an interface, and what applies to it.
//!
//! Input: local endpoints (from `local`) with the class of their labels, matches (from `selectors`),
//! selectors whose policies have changed (from `active` and `order`).
//! Output: by interface name the [`EndpointProgram`] of its owner, when a batch is taken.
//!
//! Law: *owner(interface) = lowest (orchestrator, workload, endpoint) among the local endpoints that
//! name it* (host.md 8.4); its tiers are those of all policies whose selectors match its class. Only
//! what differs from the batches before is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{Name, WorkloadEndpoint, WorkloadEndpointKey};

use crate::batch::{EndpointProgram, TierProgram};
use crate::kit::Links;
use crate::local::LocalDelta;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Endpoints {
    endpoints: BTreeMap<WorkloadEndpointKey, Endpoint>,
    /// Who names which interface; the first one owns it.
    claims: Links<WorkloadEndpointKey, Name>,
    by_class: Links<WorkloadEndpointKey, u32>,
    /// What the consumer knows.
    told: BTreeMap<Name, Arc<EndpointProgram>>,
    dirty: BTreeSet<Name>,
    dirty_classes: BTreeSet<u32>,
}

#[derive(Debug)]
struct Endpoint {
    value: Arc<WorkloadEndpoint>,
    class: u32,
}

impl Endpoints {
    /// Follows a local endpoint. `class` belongs to the new value; returns the class of the old one.
    pub(crate) fn on_local(&mut self, delta: LocalDelta, class: Option<u32>) -> Option<u32> {
        let LocalDelta { key, old, new } = delta;
        let interface = |value: &Arc<WorkloadEndpoint>| Name::clone(&value.interface);
        self.dirty.extend(old.as_ref().map(interface));
        self.dirty.extend(new.as_ref().map(interface));
        self.claims.set_left(&key, new.as_ref().map(interface));
        self.by_class.set_left(&key, class);
        let before = match new.zip(class) {
            Some((value, class)) => self.endpoints.insert(key, Endpoint { value, class }),
            None => self.endpoints.remove(&key),
        };
        before.map(|endpoint| endpoint.class)
    }

    /// The policies that apply to this class of endpoints are, or are ordered, differently.
    pub(crate) fn on_class(&mut self, class: u32) {
        self.dirty_classes.insert(class);
    }

    /// Says what is new: the owner's program, or `None` for an interface without owner. `arrange`
    /// returns the tiers of a class.
    pub(crate) fn take(
        &mut self,
        mut arrange: impl FnMut(u32) -> Arc<[TierProgram]>,
    ) -> BTreeMap<Name, Option<Arc<EndpointProgram>>> {
        for class in std::mem::take(&mut self.dirty_classes) {
            let members = self.by_class.lefts(&class).filter_map(|key| self.endpoints.get(key));
            self.dirty.extend(members.map(|endpoint| Name::clone(&endpoint.value.interface)));
        }
        let mut news = BTreeMap::new();
        for interface in std::mem::take(&mut self.dirty) {
            let owner = self.claims.lefts(interface.as_ref() as &str).next();
            let owned = owner.and_then(|key| Some((key, self.endpoints.get(key)?)));
            let Some((key, Endpoint { value, class })) = owned else {
                if self.told.remove(&interface).is_some() {
                    news.insert(interface, None);
                }
                continue;
            };
            let tiers = arrange(*class);
            let is_told = self.told.get(&interface).is_some_and(|told| {
                told.key == *key
                    && (Arc::ptr_eq(&told.endpoint, value) || told.endpoint == *value)
                    && (Arc::ptr_eq(&told.tiers, &tiers) || told.tiers == tiers)
            });
            if !is_told {
                let program = Arc::new(EndpointProgram { key: key.clone(), endpoint: Arc::clone(value), tiers });
                self.told.insert(Name::clone(&interface), Arc::clone(&program));
                news.insert(interface, Some(program));
            }
        }
        news
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { endpoints, claims, by_class, told, dirty, dirty_classes } = self;
        endpoints.is_empty()
            && claims.is_empty()
            && by_class.is_empty()
            && told.is_empty()
            && dirty.is_empty()
            && dirty_classes.is_empty()
    }
}
