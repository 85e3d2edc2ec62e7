//! Which facts follow from the current datastore, incrementally.
//!
//! Fed with [`Update`]s in any order, one per changed object; gives [`Batch`]es to the compiler.
//!
//! ```text
//! endpoints --> local --> selectors (policies) --> active --> references --> members --> gather --> Batch
//!    |          hosts          |                     |  profiles --^           ^            ^
//!    |                         v                     v                         |            |
//!    |                  endpoints, hosts <-------- order                       |            |
//!    |                         +-----------------------------------------------|------------+
//!    +--> selectors (rules), network sets -------------------------------------+
//! ```
//!
//! `active` and `profiles` keep their values in `records`, in which a policy that is not active is a few
//! dozen bytes.
//!
//! Every stage is a struct with its own state that turns typed input into deltas and calls nobody;
//! [`Graph::apply`] is the wiring and reads down the page.
//!
//! Invariants: a batch depends on the updates so far and on when batches were taken, never on hash
//! maps (I10); what the batches add up to depends on the current values alone (I1); an update costs in
//! proportion to what it can change, never to all there is (policy.md A-9).

pub mod batch;
pub mod stats;

mod active;
#[cfg(test)]
mod churn;
mod endpoints;
mod gather;
mod hosts;
mod index;
mod kit;
mod labels;
mod local;
mod members;
mod names;
mod order;
mod policies;
mod profiles;
mod records;
mod references;
mod selectors;

use std::collections::HashMap;
use std::sync::Arc;

use model::{HostEndpoint, Labels, Name, Policy, PolicyKey, Update, WorkloadEndpoint, WorkloadEndpointKey};

pub use batch::{
    Batch, EndpointProgram, HostEndpointProgram, HostTiers, MemberDelta, MemberList, PolicyProgram, PolicyRef,
    ProfileProgram, RuleProgram, SetContents, SetMember, SetType, SideProgram, TierProgram,
};
pub use index::MemberIndex;
pub use members::MemberChange;
pub use stats::{Flow, SelectorStats, Stats};

use active::{ActiveDelta, ActivePolicies};
use endpoints::Endpoints;
use gather::Gather;
use hosts::{HostDelta, Hosts};
use local::{LocalDelta, LocalEndpoints};
use order::Order;
use profiles::{ActiveProfiles, ProfileDelta};
use records::Records;
use references::{RefDelta, References};
use selectors::{MatchDelta, Selectors};

/// The calculation graph. See the [module documentation](self).
#[derive(Debug)]
pub struct Graph {
    local: LocalEndpoints,
    policy_selectors: Selectors,
    /// Where `active` and `profiles` keep their values.
    records: Records,
    active: ActivePolicies,
    profiles: ActiveProfiles,
    order: Order,
    references: References,
    index: MemberIndex,
    endpoints: Endpoints,
    hosts: Hosts,
    gather: Gather,
    scratch: Scratch,
    flow: Flow,
}

/// Buffers for deltas, kept between updates so that a quiet update allocates nothing.
#[derive(Debug, Default)]
struct Scratch {
    local: Vec<LocalDelta>,
    local_matches: Vec<MatchDelta>,
    active: Vec<ActiveDelta>,
    relisted: Vec<u32>,
    retiered: Vec<u32>,
    profiles: Vec<ProfileDelta>,
    references: Vec<RefDelta>,
    classes: Vec<u32>,
}

impl Graph {
    /// Makes an empty graph for the host of this name (datastore.md 1.4: compared byte for byte).
    pub fn new(host: Name) -> Self {
        Self {
            local: LocalEndpoints::new(Name::clone(&host)),
            policy_selectors: Selectors::default(),
            records: Records::default(),
            active: ActivePolicies::default(),
            profiles: ActiveProfiles::default(),
            order: Order::default(),
            references: References::default(),
            index: MemberIndex::default(),
            endpoints: Endpoints::default(),
            hosts: Hosts::new(host),
            gather: Gather::default(),
            scratch: Scratch::default(),
            flow: Flow::default(),
        }
    }

    /// Takes one change of a fact. Any order is fine (S-14).
    pub fn apply(&mut self, update: Update) {
        self.flow.updates += 1;

        // The update enters the stages that keep its value.
        match update {
            Update::WorkloadEndpoint(key, value) => self.on_endpoint(&key, value.as_ref()),
            Update::Policy(key, value) => self.on_policy(&key, value.as_deref()),
            Update::Tier(name, value) => self.order.on_tier(&name, value, &mut self.scratch.retiered),
            Update::ProfileRules(name, value) => {
                let (names, _) = self.index.names();
                let store = (names, &mut self.records);
                self.profiles.on_rules(store, &name, value.as_ref(), &mut self.scratch.profiles);
            }
            Update::ProfileLabels(name, value) => self.on_profile_labels(&name, value.as_deref()),
            Update::NetworkSet(name, value) => self.index.on_network_set(&name, value.as_deref()),
            Update::HostEndpoint(name, value) => self.on_host_endpoint(&name, value.as_ref()),
            Update::Link(name, value) => self.gather.on_link(name, value),
            Update::Config(_, _) | Update::Ready(_) => return,
        }
        let scratch = &mut self.scratch;
        let flow = &mut self.flow;
        let records = &self.records;

        // members -> gather. Before any set goes below: its number may be given to another.
        for change in self.index.changes() {
            flow.members += 1;
            self.gather.on_member(change);
        }

        // selectors (policies) -> active, endpoints.
        flow.local_matches += scratch.local_matches.len() as u64;
        for delta in scratch.local_matches.drain(..) {
            let (MatchDelta::Started { class, .. } | MatchDelta::Stopped { class, .. }) = delta;
            let (names, _) = self.index.names();
            self.active.on_match((names, records), delta, &mut scratch.active);
            self.endpoints.on_class(class);
            self.hosts.on_class(class);
        }

        // active, tiers -> endpoints: who must look again.
        for policy in scratch.retiered.drain(..) {
            scratch.relisted.extend(self.active.selector_of(policy));
        }
        for selector in scratch.relisted.drain(..) {
            self.policy_selectors.matching(selector, &mut scratch.classes);
            for class in scratch.classes.drain(..) {
                self.endpoints.on_class(class);
                self.hosts.on_class(class);
            }
        }

        // active, profiles -> order, references.
        flow.active += scratch.active.len() as u64;
        for delta in scratch.active.drain(..) {
            self.order.on_active(&delta);
            let (names, _) = self.index.names();
            self.references.on_active((names, records), delta, &mut scratch.references);
        }
        flow.profiles += scratch.profiles.len() as u64;
        for delta in scratch.profiles.drain(..) {
            self.references.on_profile(delta, &mut scratch.references);
        }

        // references -> members, gather.
        flow.references += scratch.references.len() as u64;
        for delta in scratch.references.drain(..) {
            match delta {
                RefDelta::Needed { set, id, source } => {
                    self.gather.on_needed(set, id.clone());
                    self.index.need_source(set, id, source);
                }
                RefDelta::Policy(id, key, program) => self.gather.on_policy(id, key, program),
                RefDelta::Profile(name, program) => self.gather.on_profile(name, program),
                RefDelta::Unneeded { set, id } => {
                    self.gather.on_unneeded(set, id, self.index.is_announced(set));
                    self.index.unneed(set);
                }
            }
        }
        debug_assert!(self.index.changes().next().is_none(), "a set that is not announced has a delta");
    }

    /// endpoints -> local -> selectors (policies), profiles, endpoints; endpoints -> selectors (rules), members.
    fn on_endpoint(&mut self, key: &WorkloadEndpointKey, value: Option<&Arc<WorkloadEndpoint>>) {
        let scratch = &mut self.scratch;
        self.local.on_endpoint(key, value, &mut scratch.local);
        self.flow.local += scratch.local.len() as u64;
        for delta in scratch.local.drain(..) {
            let (names, inherited) = self.index.names();
            // The new class before the old one, so that what stays matched stays active.
            let class = delta.new.as_ref().map(|new| {
                self.policy_selectors.join(names, inherited, &new.labels, &new.profiles, &mut scratch.local_matches)
            });
            let profiles = |value: &Option<Arc<WorkloadEndpoint>>| -> Vec<Name> {
                value.as_ref().map(|value| value.profiles.clone()).unwrap_or_default()
            };
            let (old, new) = (profiles(&delta.old), profiles(&delta.new));
            self.profiles.on_list((names, &self.records), &old, &new, &mut scratch.profiles);
            if let Some(old) = self.endpoints.on_local(delta, class) {
                self.policy_selectors.leave(names, inherited, old, &mut scratch.local_matches);
            }
        }
        self.index.on_endpoint(key, value.map(Arc::as_ref));
    }

    /// host endpoints -> hosts -> selectors (policies), profiles; host endpoints -> index.
    fn on_host_endpoint(&mut self, name: &Name, value: Option<&Arc<HostEndpoint>>) {
        let scratch = &mut self.scratch;
        if let Some(HostDelta { old, new }) = self.hosts.compare(name, value) {
            self.flow.local += 1;
            let (names, inherited) = self.index.names();
            let profiles = |value: &Option<Arc<HostEndpoint>>| -> Vec<Name> {
                value.as_ref().map(|value| value.profiles.clone()).unwrap_or_default()
            };
            let (old_list, new_list) = (profiles(&old), profiles(&new));
            self.profiles.on_list((names, &self.records), &old_list, &new_list, &mut scratch.profiles);
            // The new class before the old one, so that what stays matched stays active.
            let new = new.map(|new| {
                let matches = &mut scratch.local_matches;
                let class = self.policy_selectors.join(names, inherited, &new.labels, &new.profiles, matches);
                (new, class)
            });
            if let Some(old) = self.hosts.set(name, new) {
                self.policy_selectors.leave(names, inherited, old, &mut scratch.local_matches);
            }
        }
        self.index.on_host_endpoint(name, value.map(Arc::as_ref));
    }

    /// policies -> records, selectors (policies), active.
    fn on_policy(&mut self, key: &PolicyKey, value: Option<&Policy>) {
        let Scratch { local_matches, active, relisted, .. } = &mut self.scratch;
        let records = &mut self.records;
        let (names, inherited) = self.index.names();
        let old = self.active.record(names, records, key);
        let new = value.map(|policy| records.store_policy(names, policy));
        match (old, new) {
            (None, None) => return,
            (Some(old), Some(new)) if records.are_equal(old, new) => {
                records.discard_policy(names, new);
                return;
            }
            (_, _) => (),
        }
        let value = new.and_then(|record| {
            let selector = records.selector(record)?;
            let (selector, _) = self.policy_selectors.register(names, inherited, selector, local_matches);
            Some((record, selector))
        });
        // The stage must know the matches of the new selector before it is given the policy.
        self.flow.local_matches += local_matches.len() as u64;
        for delta in local_matches.drain(..) {
            let (MatchDelta::Started { class, .. } | MatchDelta::Stopped { class, .. }) = delta;
            self.active.on_match((names, records), delta, active);
            self.endpoints.on_class(class);
            self.hosts.on_class(class);
        }
        if let Some(old) = self.active.on_policy((names, records), key, value, active, relisted) {
            self.policy_selectors.unregister(names, old, local_matches);
        }
    }

    /// profile labels -> selectors (policies), selectors (rules).
    fn on_profile_labels(&mut self, name: &Name, value: Option<&Labels>) {
        let Self { index, policy_selectors, scratch, .. } = self;
        index.change_profile(name, value, |names, inherited, change| {
            policy_selectors.change_profile(names, inherited, change, &mut scratch.local_matches);
        });
    }

    /// Everything that changed since the last call, each object at most once. Deterministic (I10).
    pub fn take_batch(&mut self) -> Batch {
        let Self { policy_selectors, active, order, endpoints, hosts, gather, index, .. } = self;
        // Classes that the same selectors match have the same tiers.
        let mut arranged: HashMap<u32, Arc<[TierProgram]>> = HashMap::new();
        let endpoints = endpoints.take(|class| {
            let selectors = policy_selectors.matches_of(class);
            let arrange = || order.arrange(selectors.flat_map(|selector| active.with_selector(selector)));
            Arc::clone(arranged.entry(policy_selectors.list_of(class)).or_insert_with(arrange))
        });
        let host_endpoints = hosts.take(|class| {
            let selectors = policy_selectors.matches_of(class);
            let policies = selectors.flat_map(|selector| active.with_selector(selector));
            order.arrange_host(&policies.collect::<Vec<_>>())
        });
        let batch = Batch { endpoints, host_endpoints, ..gather.take(index) };
        self.flow.output += [
            batch.links.len(),
            batch.sets_created.len(),
            batch.members.len(),
            batch.policies.len(),
            batch.profiles.len(),
            batch.endpoints.len(),
            batch.host_endpoints.len(),
            batch.sets_removed.len(),
        ]
        .into_iter()
        .sum::<usize>() as u64;
        batch
    }

    /// The tiers that active policies name and that do not exist, in order: they are enforced last and
    /// deny (T-4), which is right for OpenStack and worth a log line elsewhere (X-1).
    pub fn missing_tiers(&self) -> impl Iterator<Item = &Name> {
        self.order.missing()
    }

    /// Sizes and work done so far. Looks at every local endpoint.
    pub fn stats(&self) -> Stats {
        let lists = self.local.values().map(|endpoint| &endpoint.profiles);
        let lists = lists.chain(self.hosts.values().map(|endpoint| &endpoint.profiles));
        let names = self.index.known_names();
        let lacking = lists.filter(|list| list.iter().any(|profile| !self.profiles.is_stored(names, profile)));
        Stats {
            local_endpoints: (self.local.values().len() + self.hosts.values().len()) as u64,
            endpoints_missing_a_profile: lacking.count() as u64,
            active_policies: self.active.active() as u64,
            active_profiles: self.profiles.len() as u64,
            active_sets: self.references.sets() as u64,
            objects: self.index.objects() as u64,
            policy_selectors: self.policy_selectors.stats(),
            rule_selectors: self.index.stats(),
            flow: Flow { rule_matches: self.index.match_count(), ..self.flow },
        }
    }

    /// True if no stage holds anything: every fact has gone, and a batch has been taken since. For tests.
    pub fn is_empty(&self) -> bool {
        let Self {
            local,
            policy_selectors,
            records,
            active,
            profiles,
            order,
            references,
            index,
            endpoints,
            hosts,
            gather,
            scratch: _,
            flow: _,
        } = self;
        local.is_empty()
            && policy_selectors.is_empty()
            && records.is_empty()
            && active.is_empty()
            && profiles.is_empty()
            && order.is_empty()
            && references.is_empty()
            && index.is_empty()
            && endpoints.is_empty()
            && hosts.is_empty()
            && gather.is_empty()
    }
}
