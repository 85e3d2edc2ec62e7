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

use crate::batch::{Batch, Gathered, PolicyProgram, ProfileProgram};
use crate::index::MemberIndex;
use crate::kit::{IdMap, Pending, PendingById};
use crate::members::MemberChange;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Gather {
    seq: u64,
    links: Pending<Name, LinkState>,
    link_states: BTreeMap<Name, LinkState>,
    policies: PendingById<PolicyKey, Arc<PolicyProgram>>,
    profiles: Pending<Name, Arc<ProfileProgram>>,
    created: BTreeMap<SetId, Created>,
    removed: BTreeSet<SetId>,
    /// By set number.
    members: IdMap<u32, Gathered>,
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

    /// `id`: the number that the policy has, or had until just now.
    pub(crate) fn on_policy(&mut self, id: u32, key: PolicyKey, program: Option<Arc<PolicyProgram>>) {
        match program {
            Some(program) => self.policies.set(id, key, program),
            None => self.policies.remove(id, key),
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

    pub(crate) fn on_member(&mut self, change: MemberChange) {
        let (set, member, added) = match change {
            MemberChange::Added { set, member } => (set, member, true),
            MemberChange::Removed { set, member } => (set, member, false),
        };
        self.members.entry(set).or_default().push(member, added);
    }

    /// Returns what is new, without endpoints, and starts over.
    pub(crate) fn take(&mut self, index: &mut MemberIndex) -> Batch {
        self.seq += 1;
        // The order of the hash map ends in that of the batch's own map.
        let changes = std::mem::take(&mut self.members).into_iter().filter_map(|(set, changes)| {
            let changes = changes.take();
            // There and back again: nothing to tell.
            let is_news = !changes.added.is_empty() || !changes.removed.is_empty();
            Some((index.id_of(set).filter(|_| is_news)?.clone(), changes))
        });
        let changes = changes.collect();
        let created = std::mem::take(&mut self.created).into_iter().filter_map(|(id, Created { set, .. })| {
            let contents = index.announce(set);
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
            sets_removed: std::mem::take(&mut self.removed),
            ..Batch::default()
        }
    }

    /// True if the consumer knows of nothing and there is nothing to tell it.
    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 4] {
        [
            ("links", self.link_states.len()),
            ("created sets", self.created.len()),
            ("removed sets", self.removed.len()),
            ("sets with changes", self.members.len()),
        ]
    }

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

#[cfg(test)]
mod tests {
    use testkit::build;

    use super::*;
    use crate::batch::SetMember;

    /// The table of F-7 and rule F-8, for sets and their members.
    #[test]
    fn only_the_net_result_of_a_set_is_told() {
        let cases = [
            ("added and removed, never sent", "need; drop; take", ""),
            ("added, then members", "need; + 1; + 2; - 1; take", "create 10.0.0.2/32"),
            ("member added and removed", "need; take; + 1; - 1; take", "create | "),
            ("member removed and added", "need; + 1; take; - 1; + 1; take", "create 10.0.0.1/32 | "),
            (
                "members of a set that was sent",
                "need; + 1; take; - 1; + 2; take",
                "create 10.0.0.1/32 | +10.0.0.2/32 -10.0.0.1/32",
            ),
            (
                "sent, removed, added again",
                "need; + 1; take; drop; need; + 2; take",
                "create 10.0.0.1/32 | create 10.0.0.2/32",
            ),
            ("sent, changed, removed", "need; take; + 1; drop; take", "create | remove"),
            ("sent, removed, added, removed", "need; take; drop; need; + 1; drop; take", "create | remove"),
            ("sent, removed, added, removed, added", "need; take; drop; need; drop; need; take", "create | create"),
            ("removed for good, then anew", "need; take; drop; take; need; take", "create | remove | create"),
        ];
        for (name, script, expected) in cases {
            assert_eq!(run(script), expected, "{name}");
        }
    }

    /// Runs a script against gather and members; `+ n` and `- n` add and remove 10.0.0.n.
    fn run(script: &str) -> String {
        let (mut gather, mut index) = (Gather::default(), MemberIndex::default());
        let selector = build::selector("all()");
        let id = selector.id().clone();
        let mut said = Vec::new();
        let object = |index: &mut MemberIndex, n: u8, there: bool| {
            let (key, value) = build::wep(&format!("h/o/w/{n}")).ip(&format!("10.0.0.{n}")).value();
            index.on_endpoint(&key, there.then_some(value.as_ref()));
        };
        for step in script.split("; ") {
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["need"] => {
                    gather.on_needed(0, id.clone());
                    index.need(0, &selector);
                }
                ["drop"] => {
                    gather.on_unneeded(0, id.clone(), index.is_announced(0));
                    index.unneed(0);
                    // What was in it would come back with the next need.
                    (1..=2).for_each(|n| object(&mut index, n, false));
                }
                [sign, n] => {
                    object(&mut index, n.parse().unwrap(), sign == "+");
                    index.changes().for_each(|change| gather.on_member(change));
                }
                ["take"] => said.push(text(gather.take(&mut index))),
                ref other => panic!("step {other:?}"),
            }
        }
        said.join(" | ")
    }

    fn text(batch: Batch) -> String {
        let member = |member: &SetMember| match member {
            SetMember::Net(net) => net.to_string(),
            SetMember::AddressPort { .. } => panic!("no ports here"),
        };
        let mut words = Vec::new();
        for set in batch.sets_created.values() {
            words.push("create".to_owned());
            words.extend(set.members.iter().map(|known| member(&known)));
        }
        for delta in batch.members.values() {
            words.extend(delta.added.iter().map(|net| format!("+{}", member(&net))));
            words.extend(delta.removed.iter().map(|net| format!("-{}", member(&net))));
        }
        words.extend(batch.sets_removed.iter().map(|_| "remove".to_owned()));
        words.join(" ")
    }

    #[test]
    fn links_are_told_when_they_differ() {
        let mut gather = Gather::default();
        let mut index = MemberIndex::default();
        let up = LinkState { index: 3, up: true, generation: 1 };
        let down = LinkState { up: false, ..up };
        let mut told = |states: &[Option<LinkState>]| {
            for state in states {
                gather.on_link("tap1".into(), *state);
            }
            gather.take(&mut index).links.into_values().next()
        };
        assert_eq!(told(&[Some(up), None]), None);
        assert_eq!(told(&[Some(down), Some(up)]), Some(Some(up)));
        assert_eq!(told(&[Some(up)]), None);
        assert_eq!(told(&[None, Some(down)]), Some(Some(down)));
        assert_eq!(told(&[None]), Some(None));
        assert_eq!(told(&[None]), None);
    }
}
