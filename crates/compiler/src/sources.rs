//! What lazy chains are rendered from: policies, profiles and policy groups.
//!
//! Fed with the policies and profiles of a batch and with the groups of endpoints; renders the chains
//! that [`crate::uses`] asks for by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use foldhash::fast::RandomState;
use graph::{PolicyProgram, ProfileProgram, RuleProgram};
use model::{Family, Name, PolicyKey, SetId};
use program::{Chain, ChainName, Direction, SetName, TableId};

use crate::Complaint;
use crate::endpoint::{self, Group, Groups};
use crate::names;
use crate::options::Options;
use crate::policy::{self, Context, Owner};

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// With the number of lists of endpoints ([`crate::lists`]) that have it.
    groups: BTreeMap<ChainName, (Group, usize)>,
    by_chain: HashMap<ChainName, Source, RandomState>,
    /// Chains whose source changed, for the tables that need them.
    changed: BTreeSet<ChainName>,
}

#[derive(Clone, Debug)]
enum Source {
    Policy(PolicyKey, Arc<PolicyProgram>, Direction),
    Profile(Name, Arc<ProfileProgram>, Direction),
}

impl Sources {
    /// Takes a policy or its absence, and returns the names of its chains. Staged ones have no chains.
    pub(crate) fn set_policy(
        &mut self,
        key: &PolicyKey,
        program: Option<&Arc<PolicyProgram>>,
    ) -> Option<[ChainName; 2]> {
        if key.kind.is_staged() {
            return None;
        }
        Some(DIRECTIONS.map(|direction| {
            let chain = names::policy_chain(key, direction);
            let source = program.map(|program| Source::Policy(key.clone(), Arc::clone(program), direction));
            self.set_source(chain.clone(), source);
            chain
        }))
    }

    /// Takes a profile or its absence.
    pub(crate) fn set_profile(&mut self, name: &Name, program: Option<&Arc<ProfileProgram>>) {
        for direction in DIRECTIONS {
            let source = program.map(|program| Source::Profile(Name::clone(name), Arc::clone(program), direction));
            self.set_source(names::profile_chain(name, direction), source);
        }
    }

    fn set_source(&mut self, chain: ChainName, source: Option<Source>) {
        self.changed.insert(chain.clone());
        match source {
            Some(source) => self.by_chain.insert(chain, source),
            None => self.by_chain.remove(&chain),
        };
    }

    /// Counts the groups of a list; balanced by [`Self::drop_groups`] with the names.
    pub(crate) fn hold_groups(&mut self, groups: Groups) {
        for (name, group) in groups {
            self.groups.entry(name).or_insert((group, 0)).1 += 1;
        }
    }

    pub(crate) fn drop_groups(&mut self, names: &[ChainName]) {
        for name in names {
            let Some((_, holders)) = self.groups.get_mut(name) else { continue };
            *holders = holders.saturating_sub(1);
            if *holders == 0 {
                self.groups.remove(name);
            }
        }
    }

    /// The chains whose source changed since the last call.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<ChainName> {
        std::mem::take(&mut self.changed)
    }

    /// Renders a chain for one table, or returns `None` if there is nothing to render it from.
    pub(crate) fn render(
        &self,
        options: &Options,
        table: TableId,
        name: &ChainName,
        set_name: &dyn Fn(&SetId, Family) -> Option<SetName>,
        complaints: &mut Vec<Complaint>,
    ) -> Option<Chain> {
        let TableId { family, table } = table;
        let context = |owner, direction| Context { options, owner, direction, family, table, set_name };
        match self.by_chain.get(name) {
            Some(source @ Source::Policy(key, program, direction)) => {
                let owner = Owner::Policy { key, tier: &program.tier, untracked: program.untracked };
                Some(policy::chain(&context(owner, *direction), source.rules(), complaints))
            }
            Some(source @ Source::Profile(name, _, direction)) => {
                let owner = Owner::Profile { name };
                Some(policy::chain(&context(owner, *direction), source.rules(), complaints))
            }
            None => {
                let (group, _) = self.groups.get(name)?;
                Some(endpoint::group_chain(options, name.clone(), group))
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let Self { groups, by_chain, changed } = self;
        groups.is_empty() && by_chain.is_empty() && changed.is_empty()
    }
}

impl Source {
    fn rules(&self) -> &[RuleProgram] {
        match self {
            Self::Policy(_, program, Direction::Ingress) => &program.inbound,
            Self::Policy(_, program, Direction::Egress) => &program.outbound,
            Self::Profile(_, program, Direction::Ingress) => &program.inbound,
            Self::Profile(_, program, Direction::Egress) => &program.outbound,
        }
    }
}
