//! A model of the kernel's packet filter: it takes the changes that the compiler asks for and walks packets
//! through the rules, one by one, as the kernel does.
//!
//! It is the second opinion to `verdict`: what that says from the stored objects, this says from the program.
//! The kernel keeps no promise that the program forgot to ask for, so a rule that names a chain or a set that
//! is not there, a match that the tools would refuse and a mark that belongs to somebody else are [`Fault`]s.
//!
//! Left out: rates and numbers of connections (always within the limit), NAT, and what others wrote.

mod check;
mod matches;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use model::Family;
use program::{
    Action, BaseChain, Chain, ChainName, Changes, Hooks, Member, Origin, Rule, SetChange, SetKind, SetName, SetSpec,
    Table, TableId,
};
use verdict::Packet;

/// What the program may do with the packet mark.
#[derive(Clone, Copy, Debug)]
pub struct Bits {
    /// All bits that are ours.
    pub ours: u32,
    /// Those that no packet may have that goes on, because they mean something the next time it is judged.
    pub never_left: u32,
}

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Kernel {
    bits: Bits,
    sets: BTreeMap<SetName, Set>,
    chains: BTreeMap<(TableId, ChainName), Arc<Chain>>,
    hooks: BTreeMap<(TableId, BaseChain), Hooks>,
}

#[derive(Clone, Debug, PartialEq)]
struct Set {
    spec: SetSpec,
    members: BTreeSet<Member>,
}

/// How a packet meets the host.
#[derive(Clone, Copy, Debug)]
pub struct Passage<'a> {
    pub way: Way,
    /// Empty for a packet that the host sends.
    pub from: &'a str,
    /// Empty for a packet to the host.
    pub to: &'a str,
    pub packet: Packet,
    /// What somebody else has marked it with.
    pub mark: u32,
    /// The interface it came from is not the way back to its source.
    pub reverse_path_failed: bool,
    /// Its destination was translated.
    pub translated: bool,
    /// Addresses of the host.
    pub local: &'a [IpAddr],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Forward,
    ToHost,
    FromHost,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Journey {
    pub fate: Fate,
    pub mark: u32,
    pub is_tracked: bool,
    /// The stored rule that the last rule with an origin came from that was met.
    pub last_origin: Option<Origin>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fate {
    Accepted,
    /// Or rejected.
    Dropped,
    /// The filter table's chain ended: other rules and the policy of the chain decide.
    Left,
}

/// Why the kernel would have refused a change, or what a program did that it must not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// The chain's end, or a return.
    Back,
}

/// A packet on its way.
#[derive(Debug)]
struct State<'a> {
    passage: Passage<'a>,
    mark: u32,
    is_tracked: bool,
    last_origin: Option<Origin>,
    /// The kernel refuses loops when a table is written.
    depth: usize,
}

/// Far more than any program of ours needs.
const DEEPEST: usize = 16;

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fault {}

impl Kernel {
    #[must_use]
    pub const fn new(bits: Bits) -> Self {
        Self { bits, sets: BTreeMap::new(), chains: BTreeMap::new(), hooks: BTreeMap::new() }
    }

    /// Makes the changes in the order in which they reach the kernel, and looks at what is there then.
    ///
    /// # Errors
    ///
    /// If the kernel or a tool would refuse a part of them.
    pub fn apply(&mut self, changes: &Changes) -> Result<(), Fault> {
        let Changes { seq, links: _, sets, tables, interfaces: _, routes: _ } = changes;
        let fault = |text: String| Fault(format!("batch {seq}: {text}"));
        for ((_, name), change) in sets {
            self.change_set(name, change).map_err(fault)?;
        }
        for (id, table) in tables {
            for (name, chain) in &table.chains {
                let key = (*id, name.clone());
                match chain {
                    Some(chain) if chain.name != *name => {
                        return Err(fault(format!("chain {name} is written as {}", chain.name)));
                    }
                    Some(chain) => drop(self.chains.insert(key, Arc::clone(chain))),
                    None if self.chains.remove(&key).is_none() => {
                        return Err(fault(format!("chain {name} removed from {id:?}, where it is not")));
                    }
                    None => {}
                }
            }
            for (base, hooks) in &table.hooks {
                self.hooks.insert((*id, *base), hooks.clone());
            }
        }
        for ((_, name), _) in sets.iter().filter(|(_, change)| **change == SetChange::Remove) {
            if self.sets.remove(name).is_none() {
                return Err(fault(format!("set {name} removed, which is not there")));
            }
        }
        self.check().map_err(fault)
    }

    fn change_set(&mut self, name: &SetName, change: &SetChange) -> Result<(), String> {
        match change {
            SetChange::Replace { spec, members } => {
                if spec.name != *name {
                    return Err(format!("set {name} is written as {}", spec.name));
                }
                check::members(spec, members)?;
                self.sets.insert(name.clone(), Set { spec: spec.clone(), members: members.iter().collect() });
            }
            SetChange::Delta { added, removed } => {
                let Some(set) = self.sets.get_mut(name) else {
                    return Err(format!("members of set {name} change, which is not there"));
                };
                if let Some(member) = removed.iter().find(|member| !set.members.contains(member)) {
                    return Err(format!("{member:?} withdrawn from set {name}, which does not have it"));
                }
                if let Some(member) = added.iter().find(|member| set.members.contains(member)) {
                    return Err(format!("{member:?} added to set {name}, which has it"));
                }
                check::members(&set.spec, added)?;
                set.members.retain(|member| !removed.contains(member));
                set.members.extend(added.iter());
            }
            SetChange::Remove => {}
        }
        Ok(())
    }

    /// The sets with their members.
    pub fn sets(&self) -> impl Iterator<Item = (&SetName, &BTreeSet<Member>)> {
        self.sets.iter().map(|(name, set)| (name, &set.members))
    }

    /// The members of a set that is there.
    pub fn members(&self, name: &SetName) -> Option<&BTreeSet<Member>> {
        self.sets.get(name).map(|set| &set.members)
    }

    /// Tells whether all chains of the other's tables of a family are here, with the same rules.
    pub fn has_rules_of(&self, other: &Self, family: Family) -> bool {
        let mut chains = other.chains.iter().filter(|((id, _), _)| id.family == family);
        chains.all(|(key, chain)| self.chains.get(key).is_some_and(|mine| are_written_alike(&mine.rules, &chain.rules)))
    }

    /// The same with another's rules in one table of both families.
    #[must_use]
    pub fn with_table_of(&self, other: &Self, table: Table) -> Self {
        let mut mixture = self.clone();
        mixture.chains.retain(|(id, _), _| id.table != table);
        let chains = other.chains.iter().filter(|((id, _), _)| id.table == table);
        mixture.chains.extend(chains.map(|(key, chain)| (key.clone(), Arc::clone(chain))));
        mixture.hooks.retain(|(id, _), _| id.table != table);
        let hooks = other.hooks.iter().filter(|((id, _), _)| id.table == table);
        mixture.hooks.extend(hooks.map(|(key, hooks)| (*key, hooks.clone())));
        mixture
    }

    /// Tells whether a chain of the table has a rule that the other's does not have there.
    pub fn has_more_rules_than(&self, other: &Self, table: Table) -> bool {
        self.chains.iter().filter(|((id, _), _)| id.table == table).any(|(key, chain)| {
            let others = other.chains.get(key).map(|chain| chain.rules.as_slice()).unwrap_or_default();
            chain.rules.iter().any(|rule| !others.contains(rule))
        })
    }

    /// The hooks of the base chains.
    pub fn hooks(&self) -> impl Iterator<Item = (&(TableId, BaseChain), &Hooks)> {
        self.hooks.iter()
    }

    /// Tells what of the other's is not the same here, in words. Where rules come from does not count.
    pub fn lacks_of(&self, other: &Self) -> Vec<String> {
        let mut words = Vec::new();
        let shown = |rules: &[Rule]| -> Vec<String> { rules.iter().map(|rule| format!("{rule:?}")).collect() };
        for ((id, name), chain) in &other.chains {
            let mine = self.chains.get(&(*id, name.clone()));
            if mine.is_none_or(|mine| !are_written_alike(&mine.rules, &chain.rules)) {
                let mine = mine.map(|mine| shown(&mine.rules));
                words.push(format!("{id:?} {name} is {mine:#?} instead of {:#?}", shown(&chain.rules)));
            }
        }
        for ((id, base), hooks) in &other.hooks {
            let all = |hooks: &Hooks| hooks.inserts.iter().chain(&hooks.appends).cloned().collect::<Vec<_>>();
            let mine = self.hooks.get(&(*id, *base)).map(all).unwrap_or_default();
            if !are_written_alike(&mine, &all(hooks)) {
                words.push(format!("{id:?} {base:?} is {mine:#?} instead of {hooks:#?}"));
            }
        }
        for (name, set) in &other.sets {
            let mine = self.sets.get(name).map(|mine| &mine.members);
            if mine != Some(&set.members) {
                words.push(format!("set {name} is {mine:?} instead of {:?}", set.members));
            }
        }
        words
    }

    /// Puts one rule in the place of all rules of some chains. Returns which.
    pub fn close_chains(
        &mut self,
        rule: &Rule,
        is_meant: impl Fn(&TableId, &Chain) -> bool,
    ) -> BTreeSet<(TableId, ChainName)> {
        let meant = self.chains.iter_mut().filter(|((id, _), chain)| is_meant(id, chain));
        meant
            .map(|((id, name), chain)| {
                *chain = Arc::new(Chain { name: name.clone(), rules: vec![rule.clone()] });
                (*id, name.clone())
            })
            .collect()
    }

    /// Gives a set that is there other members.
    pub fn replace_members(&mut self, name: &SetName, members: BTreeSet<Member>) {
        if let Some(set) = self.sets.get_mut(name) {
            set.members = members;
        }
    }

    // What a kernel has that others write.

    pub(crate) fn put_set(&mut self, name: SetName, kind: SetKind, family: Family, members: BTreeSet<Member>) {
        let spec = SetSpec { name: name.clone(), family, kind, max_members: u32::MAX };
        self.sets.insert(name, Set { spec, members });
    }

    pub(crate) fn remove_set(&mut self, name: &SetName) {
        self.sets.remove(name);
    }

    pub(crate) fn put_chain(&mut self, id: TableId, name: ChainName, chain: Option<Arc<Chain>>) {
        match chain {
            Some(chain) => drop(self.chains.insert((id, name), chain)),
            None => drop(self.chains.remove(&(id, name))),
        }
    }

    pub(crate) fn put_hooks(&mut self, id: TableId, base: BaseChain, hooks: Hooks) {
        self.hooks.insert((id, base), hooks);
    }

    /// Tells whether everything that is there is the same in both.
    pub fn holds_the_same_as(&self, other: &Self) -> bool {
        let Self { bits: _, sets, chains, hooks } = self;
        *sets == other.sets && *chains == other.chains && *hooks == other.hooks
    }

    /// Walks a packet through the tables.
    ///
    /// # Errors
    ///
    /// If the walk needs something that is not there, or does something to the mark that it must not do.
    pub fn walk(&self, passage: Passage<'_>) -> Result<Journey, Fault> {
        let Passage { way, packet, mark, .. } = passage;
        let mut state = State { passage, mark, is_tracked: true, last_origin: None, depth: 0 };
        let stations: &[(Table, BaseChain)] = match way {
            Way::Forward => &[
                (Table::Raw, BaseChain::Prerouting),
                (Table::Mangle, BaseChain::Prerouting),
                (Table::Filter, BaseChain::Forward),
                (Table::Mangle, BaseChain::Postrouting),
            ],
            Way::ToHost => &[
                (Table::Raw, BaseChain::Prerouting),
                (Table::Mangle, BaseChain::Prerouting),
                (Table::Filter, BaseChain::Input),
            ],
            Way::FromHost => &[
                (Table::Raw, BaseChain::Output),
                (Table::Filter, BaseChain::Output),
                (Table::Mangle, BaseChain::Postrouting),
            ],
        };
        let mut fate = Fate::Left;
        for (table, base) in stations {
            let id = TableId { family: packet.family(), table: *table };
            let Some(hooks) = self.hooks.get(&(id, *base)) else { continue };
            let end = self.rules(id, hooks.inserts.iter().chain(&hooks.appends), &mut state)?;
            match end {
                End::Drop => {
                    let State { mark, is_tracked, last_origin, .. } = state;
                    return Ok(Journey { fate: Fate::Dropped, mark, is_tracked, last_origin });
                }
                End::Accept if *table == Table::Filter => fate = Fate::Accepted,
                End::Accept | End::Back => {}
            }
        }
        let State { mark: left, is_tracked, last_origin, .. } = state;
        let Bits { ours, never_left } = self.bits;
        if (left ^ mark) & !ours != 0 || left & never_left & !mark != 0 {
            return Err(Fault(format!("the mark {mark:#x} became {left:#x}")));
        }
        Ok(Journey { fate, mark: left, is_tracked, last_origin })
    }

    fn rules<'r>(
        &self,
        id: TableId,
        rules: impl Iterator<Item = &'r Rule>,
        state: &mut State<'_>,
    ) -> Result<End, Fault> {
        for rule in rules {
            if !self.meets_all(id, rule, state)? {
                continue;
            }
            if rule.origin.is_some() {
                state.last_origin.clone_from(&rule.origin);
            }
            let Some(action) = &rule.action else { continue };
            match action {
                Action::Accept => return Ok(End::Accept),
                Action::Drop | Action::Reject => return Ok(End::Drop),
                Action::Return => return Ok(End::Back),
                Action::Jump(name) | Action::Goto(name) => {
                    let end = self.chain(id, name, state)?;
                    if end != End::Back || matches!(action, Action::Goto(_)) {
                        return Ok(end);
                    }
                }
                Action::SetMark(bits) => state.mark |= bits,
                Action::ClearMark(bits) => state.mark &= !bits,
                Action::SetMaskedMark { value, mask } => state.mark = state.mark & !mask | value,
                Action::MarkWithinRate { mark, .. } => state.mark |= mark,
                Action::NoTrack => state.is_tracked = false,
                Action::Log { .. } | Action::NfLog { .. } | Action::RejectConnectionsAbove(_) | Action::Dscp(_) => {}
                Action::Dnat { .. } | Action::Snat { .. } | Action::Masquerade { .. } => {
                    return Err(Fault(format!("{action:?} in {id:?}")));
                }
            }
        }
        Ok(End::Back)
    }

    fn chain(&self, id: TableId, name: &ChainName, state: &mut State<'_>) -> Result<End, Fault> {
        let Some(chain) = self.chains.get(&(id, name.clone())) else {
            return Err(Fault(format!("chain {name} is not in {id:?}")));
        };
        if state.depth == DEEPEST {
            return Err(Fault(format!("chain {name} of {id:?} is reached through {DEEPEST} chains")));
        }
        state.depth += 1;
        let end = self.rules(id, chain.rules.iter(), state);
        state.depth -= 1;
        end
    }
}

/// Whether rules are the same as far as the kernel sees them.
fn are_written_alike(some: &[Rule], others: &[Rule]) -> bool {
    let alike = |(one, other): (&Rule, &Rule)| {
        let Rule { matches, action, comments, origin: _ } = one;
        (matches, action, comments) == (&other.matches, &other.action, &other.comments)
    };
    some.len() == others.len() && some.iter().zip(others).all(alike)
}
