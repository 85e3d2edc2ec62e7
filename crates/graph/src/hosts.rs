//! Which host endpoints are on this host, and what applies to them.
//!
//! Input: host endpoints of all hosts, the class of their labels and matches (from `selectors`),
//! selectors whose policies have changed (from `active` and `order`).
//! Output: [`HostDelta`], consumed by `selectors` (policies) and `profiles`; by name the
//! [`HostEndpointProgram`] of each local one, when a batch is taken.
//!
//! Law: *local = { endpoint | its host = this host, byte for byte }* (datastore.md 1.4); their tiers are
//! those of all policies whose selectors match their class, in four lists (T-9). Only what differs from
//! the batches before is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{HostEndpoint, Name};

use crate::batch::{HostEndpointProgram, HostTiers};
use crate::kit::Links;

/// A local host endpoint came, changed or went; the two values differ.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HostDelta {
    pub(crate) old: Option<Arc<HostEndpoint>>,
    pub(crate) new: Option<Arc<HostEndpoint>>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Hosts {
    host: Name,
    endpoints: BTreeMap<Name, Endpoint>,
    by_class: Links<Name, u32>,
    /// What the consumer knows.
    told: BTreeMap<Name, Arc<HostEndpointProgram>>,
    dirty: BTreeSet<Name>,
    dirty_classes: BTreeSet<u32>,
}

#[derive(Debug)]
struct Endpoint {
    value: Arc<HostEndpoint>,
    class: u32,
}

impl Hosts {
    pub(crate) fn new(host: Name) -> Self {
        Self {
            host,
            endpoints: BTreeMap::new(),
            by_class: Links::default(),
            told: BTreeMap::new(),
            dirty: BTreeSet::new(),
            dirty_classes: BTreeSet::new(),
        }
    }

    /// Says what a value means for this host: an endpoint that is now of another host has gone (C-11).
    pub(crate) fn compare(&self, name: &Name, value: Option<&Arc<HostEndpoint>>) -> Option<HostDelta> {
        let new = value.filter(|value| value.host == self.host);
        let old = self.endpoints.get(name).map(|endpoint| &endpoint.value);
        (old != new).then(|| HostDelta { old: old.cloned(), new: new.cloned() })
    }

    /// Stores a local endpoint with the class of its labels, or forgets it. Returns the class before.
    pub(crate) fn set(&mut self, name: &Name, new: Option<(Arc<HostEndpoint>, u32)>) -> Option<u32> {
        self.dirty.insert(Name::clone(name));
        self.by_class.set_left(name, new.as_ref().map(|(_, class)| *class));
        let before = match new {
            Some((value, class)) => self.endpoints.insert(Name::clone(name), Endpoint { value, class }),
            None => self.endpoints.remove(name),
        };
        before.map(|endpoint| endpoint.class)
    }

    /// The policies that apply to this class of endpoints are, or are ordered, differently.
    pub(crate) fn on_class(&mut self, class: u32) {
        if self.by_class.lefts(&class).next().is_some() {
            self.dirty_classes.insert(class);
        }
    }

    /// Says what is new: programs, or `None` for an endpoint that has gone. `arrange` returns the tiers
    /// of a class.
    pub(crate) fn take(
        &mut self,
        mut arrange: impl FnMut(u32) -> HostTiers,
    ) -> BTreeMap<Name, Option<Arc<HostEndpointProgram>>> {
        for class in std::mem::take(&mut self.dirty_classes) {
            self.dirty.extend(self.by_class.lefts(&class).cloned());
        }
        let mut news = BTreeMap::new();
        for name in std::mem::take(&mut self.dirty) {
            let Some(Endpoint { value, class }) = self.endpoints.get(&name) else {
                if self.told.remove(&name).is_some() {
                    news.insert(name, None);
                }
                continue;
            };
            let tiers = arrange(*class);
            let is_told = self.told.get(&name).is_some_and(|told| told.endpoint == *value && told.tiers == tiers);
            if !is_told {
                let program = HostEndpointProgram { name: Name::clone(&name), endpoint: Arc::clone(value), tiers };
                let program = Arc::new(program);
                self.told.insert(Name::clone(&name), Arc::clone(&program));
                news.insert(name, Some(program));
            }
        }
        news
    }

    pub(crate) fn values(&self) -> impl ExactSizeIterator<Item = &Arc<HostEndpoint>> {
        self.endpoints.values().map(|endpoint| &endpoint.value)
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 5] {
        [
            ("host endpoints", self.endpoints.len()),
            ("host endpoints by class", (0..1_000).map(|class| self.by_class.lefts(&class).count()).sum()),
            ("told host endpoints", self.told.len()),
            ("dirty host endpoints", self.dirty.len()),
            ("dirty classes of host endpoints", self.dirty_classes.len()),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { host: _, endpoints, by_class, told, dirty, dirty_classes } = self;
        endpoints.is_empty() && by_class.is_empty() && told.is_empty() && dirty.is_empty() && dirty_classes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use testkit::build;

    use super::*;

    #[test]
    fn only_endpoints_of_this_host_and_only_differences_are_told() {
        let script = [
            ("a h1 eth0", "a eth0"),
            ("a h1 eth0", ""),
            ("a h1 eth1", "a eth1"),
            ("b h2 eth0", ""),
            ("b H1 eth0", ""),
            // C-11, both ways.
            ("b h1 *", "b *"),
            ("a h2 eth1", "a gone"),
            ("a gone", ""),
            ("b gone", "b gone"),
        ];
        let mut stage = Hosts::new("h1".into());
        for (step, expected) in script {
            let (name, value) = match step.split(' ').collect::<Vec<_>>()[..] {
                [name, "gone"] => (Name::from(name), None),
                [name, host, interface] => {
                    let (name, value) = build::hep(name, host).interface(interface).value();
                    (name, Some(value))
                }
                ref other => panic!("step {other:?}"),
            };
            if let Some(HostDelta { old, new }) = stage.compare(&name, value.as_ref()) {
                assert_eq!(stage.set(&name, new.map(|new| (new, 7))), old.map(|_| 7), "step {step:?}");
            }
            let told = stage.take(|_| HostTiers::default());
            let told = told.into_iter().map(|(name, program)| match program {
                Some(program) => format!("{name} {}", program.endpoint.interface),
                None => format!("{name} gone"),
            });
            assert_eq!(told.collect::<Vec<_>>().join(", "), expected, "step {step:?}");
        }
        assert!(stage.is_empty());
    }

    #[test]
    fn the_endpoints_of_a_class_look_again_and_stay_silent_if_nothing_changed() {
        let mut stage = Hosts::new("h1".into());
        let tiers = |names: &[&str]| HostTiers {
            forward: names
                .iter()
                .map(|name| crate::batch::TierProgram {
                    name: (*name).into(),
                    ingress: vec![],
                    egress: vec![],
                    default_pass: false,
                })
                .collect(),
            ..HostTiers::default()
        };
        for (name, class) in [("a", 7), ("b", 7), ("c", 8)] {
            let (name, value) = build::hep(name, "h1").value();
            stage.set(&name, Some((value, class)));
        }
        assert_eq!(stage.take(|_| tiers(&["t"])).len(), 3);
        stage.on_class(7);
        stage.on_class(9);
        let mut asked = Vec::new();
        let told = stage.take(|class| {
            asked.push(class);
            tiers(&["t"])
        });
        assert_eq!((asked, told.len()), (vec![7, 7], 0));
        stage.on_class(7);
        assert_eq!(stage.take(|_| tiers(&[])).len(), 2);
    }
}
