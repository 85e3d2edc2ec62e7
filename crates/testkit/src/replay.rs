//! What a consumer of batches knows, and whether the batches keep their promises.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use graph::{
    Batch, EndpointProgram, HostEndpointProgram, HostTiers, PolicyProgram, ProfileProgram, RuleProgram, SetContents,
    TierProgram,
};
use model::{LinkState, Name, PolicyKey, SetId};

/// Everything that batches add up to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    pub links: BTreeMap<Name, LinkState>,
    pub sets: BTreeMap<SetId, SetContents>,
    pub policies: BTreeMap<PolicyKey, Arc<PolicyProgram>>,
    pub profiles: BTreeMap<Name, Arc<ProfileProgram>>,
    pub endpoints: BTreeMap<Name, Arc<EndpointProgram>>,
    pub host_endpoints: BTreeMap<Name, Arc<HostEndpointProgram>>,
}

impl Known {
    /// Applies a batch.
    ///
    /// # Errors
    ///
    /// Says which promise the batch breaks (policy.md F-3, F-7, F-8).
    pub fn replay(&mut self, batch: Batch) -> Result<(), String> {
        let Batch { seq, links, sets_created, members, policies, profiles, endpoints, host_endpoints, sets_removed } =
            batch;
        self.replay_sets(sets_created, members).map_err(|error| format!("batch {seq}: {error}"))?;
        follow(&mut self.links, links, "link")?;
        follow(&mut self.policies, policies, "policy")?;
        follow(&mut self.profiles, profiles, "profile")?;
        follow(&mut self.endpoints, endpoints, "endpoint")?;
        follow(&mut self.host_endpoints, host_endpoints, "host endpoint")?;
        for id in sets_removed {
            self.sets.remove(&id).ok_or_else(|| format!("batch {seq}: set {id} removed, but not known"))?;
        }
        self.check().map_err(|error| format!("after batch {seq}: {error}"))
    }

    fn replay_sets(
        &mut self,
        created: BTreeMap<SetId, SetContents>,
        members: BTreeMap<SetId, graph::MemberDelta>,
    ) -> Result<(), String> {
        for (id, delta) in members {
            if created.contains_key(&id) {
                return Err(format!("set {id} both created and changed"));
            }
            let Some(set) = self.sets.get_mut(&id) else { return Err(format!("change of unknown set {id}")) };
            if delta.added.is_empty() && delta.removed.is_empty() {
                return Err(format!("empty change of set {id}"));
            }
            for member in delta.removed.iter() {
                if !set.members.remove(&member) {
                    return Err(format!("{member:?} removed from {id}, but not in it"));
                }
            }
            for member in delta.added.iter() {
                if !set.members.insert(member) {
                    return Err(format!("{member:?} added to {id}, but already in it"));
                }
            }
        }
        self.sets.extend(created);
        Ok(())
    }

    /// Every reference resolves, and nothing is there that nobody refers to.
    fn check(&self) -> Result<(), String> {
        let mut named = BTreeSet::new();
        for (key, program) in &self.policies {
            for id in program.inbound.iter().chain(&program.outbound).flat_map(sets_of) {
                named.insert(id);
                if !self.sets.contains_key(id) {
                    return Err(format!("policy {key} names set {id}, which does not exist"));
                }
            }
        }
        for (name, program) in &self.profiles {
            for id in program.inbound.iter().chain(&program.outbound).flat_map(sets_of) {
                named.insert(id);
                if !self.sets.contains_key(id) {
                    return Err(format!("profile {name} names set {id}, which does not exist"));
                }
            }
        }
        if let Some(id) = self.sets.keys().find(|id| !named.contains(id)) {
            return Err(format!("set {id} exists, but nothing names it"));
        }
        for (interface, program) in &self.endpoints {
            let EndpointProgram { key: _, endpoint, tiers } = program.as_ref();
            self.check_lists(&format!("interface {interface}"), &[tiers], &endpoint.profiles)?;
        }
        for (name, program) in &self.host_endpoints {
            let HostTiers { untracked, pre_dnat, normal, forward } = &program.tiers;
            let lists = [untracked, pre_dnat, normal, forward].map(AsRef::as_ref);
            self.check_lists(&format!("host endpoint {name}"), &lists, &program.endpoint.profiles)?;
        }
        Ok(())
    }

    fn check_lists(&self, who: &str, lists: &[&[TierProgram]], profiles: &[Name]) -> Result<(), String> {
        for tier in lists.iter().copied().flatten() {
            if tier.ingress.is_empty() && tier.egress.is_empty() {
                return Err(format!("{who} lists tier {} without a policy", tier.name));
            }
            for policy in tier.ingress.iter().chain(&tier.egress) {
                if !self.policies.contains_key(&policy.key) {
                    return Err(format!("{who} lists unknown policy {}", policy.key));
                }
            }
        }
        match profiles.iter().find(|profile| !self.profiles.contains_key(*profile)) {
            Some(profile) => Err(format!("{who} lists unknown profile {profile}")),
            None => Ok(()),
        }
    }
}

fn follow<K: Ord + std::fmt::Debug, V>(
    known: &mut BTreeMap<K, V>,
    changes: BTreeMap<K, Option<V>>,
    what: &str,
) -> Result<(), String> {
    for (key, value) in changes {
        match value {
            Some(value) => drop(known.insert(key, value)),
            None if known.remove(&key).is_none() => return Err(format!("{what} {key:?} removed, but not known")),
            None => (),
        }
    }
    Ok(())
}

/// All sets that a rule names.
pub fn sets_of(rule: &RuleProgram) -> impl Iterator<Item = &SetId> {
    [&rule.source, &rule.destination].into_iter().flat_map(|side| {
        let lists =
            [&side.sets, &side.not_sets, &side.named_port_sets, &side.not_named_port_sets, &side.address_port_sets];
        lists.into_iter().flatten()
    })
}
