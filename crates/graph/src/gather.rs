//! The net result of everything since the last batch (policy.md F-1, F-7, F-8).
//!
//! Input: deltas of `references` (programs, sets), `members`, interfaces; endpoints when a batch is
//! taken. Output: [`Batch`], consumed by the compiler.
//!
//! Law: a consumer that applies the batches in order knows, after each, exactly the present state.
//! A batch removes only what the consumer has been given, changes the members only of sets that it has
//! been given, and names no set that the consumer will not have.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{LinkState, Name, PolicyKey, SetId};

use crate::batch::{Batch, EndpointProgram, MemberDelta as NetDelta, PolicyProgram, ProfileProgram, SetMember};
use crate::kit::{IdMap, Pending, ValueMap};
use crate::members::{MemberDelta, Members};

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Gather {
    seq: u64,
    links: Pending<Name, LinkState>,
    link_states: BTreeMap<Name, LinkState>,
    policies: Pending<PolicyKey, Arc<PolicyProgram>>,
    profiles: Pending<Name, Arc<ProfileProgram>>,
    created: BTreeMap<SetId, Created>,
    removed: BTreeSet<SetId>,
    /// By set number: members that were added (true) or removed.
    members: IdMap<u32, ValueMap<SetMember, bool>>,
}

/// A set whose full contents the next batch brings.
#[derive(Debug)]
struct Created {
    set: u32,
    /// The consumer has a set of this id, which is replaced.
    known: bool,
}

impl Gather {
    pub(crate) fn on_link(&mut self, name: Name, state: Option<LinkState>) {
        let old = match state {
            Some(state) => self.link_states.insert(Name::clone(&name), state),
            None => self.link_states.remove(&name),
        };
        match state {
            _ if old == state => (),
            Some(state) => self.links.set(name, state),
            None => self.links.remove(name),
        }
    }

    pub(crate) fn on_policy(&mut self, key: PolicyKey, program: Option<Arc<PolicyProgram>>) {
        match program {
            Some(program) => self.policies.set(key, program),
            None => self.policies.remove(key),
        }
    }

    pub(crate) fn on_profile(&mut self, name: Name, program: Option<Arc<ProfileProgram>>) {
        match program {
            Some(program) => self.profiles.set(name, program),
            None => self.profiles.remove(name),
        }
    }

    /// A set is needed from now on; its contents are read when the batch is taken.
    pub(crate) fn on_needed(&mut self, set: u32, id: SetId) {
        let known = self.removed.remove(&id);
        self.created.insert(id, Created { set, known });
    }

    /// A set is no longer needed. `announced`: it was in an earlier batch under this number.
    pub(crate) fn on_unneeded(&mut self, set: u32, id: SetId, announced: bool) {
        self.members.remove(&set);
        let known = self.created.remove(&id).map_or(announced, |created| created.known);
        if known {
            self.removed.insert(id);
        }
    }

    pub(crate) fn on_member(&mut self, delta: MemberDelta) {
        let (set, member, added) = match delta {
            MemberDelta::Added { set, member } => (set, member, true),
            MemberDelta::Removed { set, member } => (set, member, false),
        };
        let members = self.members.entry(set).or_default();
        match members.insert(member, added) {
            // There and back again: nothing to tell.
            Some(before) if before != added => drop(members.remove(&member)),
            before => debug_assert!(before.is_none(), "a member was added or removed twice"),
        }
        if members.is_empty() {
            self.members.remove(&set);
        }
    }

    /// Returns what is new, and starts over.
    pub(crate) fn take(
        &mut self,
        members: &mut Members,
        endpoints: BTreeMap<Name, Option<Arc<EndpointProgram>>>,
    ) -> Batch {
        self.seq += 1;
        // The order of the hash map ends in that of the batch's own map.
        let changes = std::mem::take(&mut self.members).into_iter().filter_map(|(set, changes)| {
            let mut delta = NetDelta::default();
            for (member, added) in changes {
                if added {
                    delta.added.insert(member)
                } else {
                    delta.removed.insert(member)
                };
            }
            Some((members.id_of(set)?.clone(), delta))
        });
        let changes = changes.collect();
        let created = std::mem::take(&mut self.created).into_iter().filter_map(|(id, Created { set, .. })| {
            let contents = members.announce(set);
            debug_assert!(contents.is_some(), "a set is to be created that is not needed");
            Some((id, contents?))
        });
        Batch {
            seq: self.seq,
            links: self.links.take(),
            sets_created: created.collect(),
            members: changes,
            policies: self.policies.take(),
            profiles: self.profiles.take(),
            endpoints,
            sets_removed: std::mem::take(&mut self.removed),
        }
    }

    /// True if the consumer knows of nothing and there is nothing to tell it.
    pub(crate) fn is_empty(&self) -> bool {
        let Self { seq: _, links, link_states, policies, profiles, created, removed, members } = self;
        links.is_empty()
            && link_states.is_empty()
            && policies.is_empty()
            && profiles.is_empty()
            && created.is_empty()
            && removed.is_empty()
            && members.is_empty()
    }
}
