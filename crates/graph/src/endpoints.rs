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

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 6] {
        [
            ("endpoints", self.endpoints.len()),
            ("endpoints by class", (0..1_000).map(|class| self.by_class.lefts(&class).count()).sum()),
            ("claims", self.told.keys().map(|interface| self.claims.lefts(interface.as_ref() as &str).count()).sum()),
            ("told endpoints", self.told.len()),
            ("dirty interfaces", self.dirty.len()),
            ("dirty classes of endpoints", self.dirty_classes.len()),
        ]
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

#[cfg(test)]
mod tests {
    use testkit::build;

    use super::*;

    /// host.md 8.4, and what is told when.
    #[test]
    fn the_lowest_claimant_owns_the_interface_and_only_differences_are_told() {
        let script = [
            ("o/b/2 tap1 10.0.0.1", "tap1 o/b/2"),
            ("o/b/2 tap1 10.0.0.1", ""),
            ("o/a/9 tap1 10.0.0.1", "tap1 o/a/9"),
            ("o/b/2 tap1 10.0.0.2", ""),
            ("o/a/9 tap2 10.0.0.1", "tap1 o/b/2, tap2 o/a/9"),
            ("k/z/9 tap1 10.0.0.1", "tap1 k/z/9"),
            ("k/z/9 tap1 10.0.0.3", "tap1 k/z/9"),
            ("o/b/2 gone", ""),
            ("k/z/9 gone", "tap1 nobody"),
            ("o/a/9 gone", "tap2 nobody"),
        ];
        let mut stage = Endpoints::default();
        let mut values: BTreeMap<WorkloadEndpointKey, Arc<WorkloadEndpoint>> = BTreeMap::new();
        for (step, expected) in script {
            let (key, new) = match step.split(' ').collect::<Vec<_>>()[..] {
                [key, "gone"] => (build::wep_key(&format!("h/{key}")), None),
                [key, interface, address] => {
                    let (key, value) = build::wep(&format!("h/{key}")).interface(interface).ip(address).value();
                    (key, Some(value))
                }
                ref other => panic!("step {other:?}"),
            };
            let old = match &new {
                Some(new) => values.insert(key.clone(), Arc::clone(new)),
                None => values.remove(&key),
            };
            let class = new.is_some().then_some(7);
            let had_class = old.is_some().then_some(7);
            assert_eq!(stage.on_local(LocalDelta { key, old, new }, class), had_class, "step {step:?}");
            let told = stage.take(|_| Arc::new([]));
            let told = told.into_iter().map(|(interface, program)| match program {
                Some(program) => {
                    let WorkloadEndpointKey { orchestrator, workload, endpoint, .. } = &program.key;
                    format!("{interface} {orchestrator}/{workload}/{endpoint}")
                }
                None => format!("{interface} nobody"),
            });
            assert_eq!(told.collect::<Vec<_>>().join(", "), expected, "step {step:?}");
        }
        assert!(stage.is_empty());
    }

    #[test]
    fn the_endpoints_of_a_class_look_again_and_stay_silent_if_nothing_changed() {
        let mut stage = Endpoints::default();
        for (n, class) in [(1, 7), (2, 7), (3, 8)] {
            let (key, value) = build::wep(&format!("h/o/w{n}/e")).value();
            stage.on_local(LocalDelta { key, old: None, new: Some(value) }, Some(class));
        }
        let tiers = |pass: bool| -> Arc<[TierProgram]> {
            let tier = TierProgram { name: "t".into(), ingress: vec![], egress: vec![], default_pass: pass };
            Arc::new([tier])
        };
        assert_eq!(stage.take(|_| tiers(false)).len(), 3);
        stage.on_class(7);
        stage.on_class(9);
        let mut asked = Vec::new();
        let told = stage.take(|class| {
            asked.push(class);
            tiers(false)
        });
        assert_eq!((asked, told.len()), (vec![7, 7], 0));
        stage.on_class(7);
        assert_eq!(stage.take(|_| tiers(true)).len(), 2);
    }
}
