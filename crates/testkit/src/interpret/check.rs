//! What the kernel and the tools refuse (netfilter.md 10.7).

use model::Family;
use program::{Action, ChainName, Match, Member, Members, Rule, SetKind, SetSpec, Table, TableId};

use super::Kernel;

/// Slots of one port match; a range takes two.
const MAX_PORT_SLOTS: usize = 15;

/// The tools read at most this many words of a rule.
const MAX_WORDS: usize = 255;

/// Protocols that the port match works with.
const PORT_PROTOCOLS: [u8; 5] = [6, 17, 33, 132, 136];

impl Kernel {
    /// Looks at everything that is there.
    pub(super) fn check(&self) -> Result<(), String> {
        for ((id, name), chain) in &self.chains {
            for rule in &chain.rules {
                self.rule(*id, rule)
                    .map_err(|error| format!("{:?} {} {name}: {error}: {rule:?}", id.family, id.table.as_str()))?;
            }
        }
        for ((id, base), hooks) in &self.hooks {
            for rule in hooks.inserts.iter().chain(&hooks.appends) {
                self.rule(*id, rule).map_err(|error| format!("{id:?} {}: {error}: {rule:?}", base.as_str()))?;
            }
        }
        Ok(())
    }

    fn rule(&self, id: TableId, rule: &Rule) -> Result<(), String> {
        if let Some(target) = rule.target().filter(|target| !self.has_chain(id, target)) {
            return Err(format!("chain {target} is not there"));
        }
        if rule.action == Some(Action::Reject) && id.table != Table::Filter {
            return Err("REJECT outside the filter table".to_owned());
        }
        let words: usize = rule.matches.iter().map(words).sum::<usize>() + 4 * rule.comments.len();
        if words + 12 > MAX_WORDS {
            return Err(format!("about {words} words"));
        }
        let protocol = rule.matches.iter().find_map(|condition| {
            if let Match::Protocol { negated: false, protocol } = condition { protocol.number() } else { None }
        });
        rule.matches.iter().try_for_each(|condition| self.condition(id, condition, protocol))?;
        let protocols = rule.matches.iter().filter(|condition| matches!(condition, Match::Protocol { .. })).count();
        if protocols > 1 {
            return Err("more than one protocol".to_owned());
        }
        for side in [program::Side::Source, program::Side::Destination] {
            let is = |condition: &&Match| matches!(condition, Match::Net { side: of, .. } | Match::Address { side: of, .. } if *of == side);
            if rule.matches.iter().filter(is).count() > 1 {
                return Err(format!("more than one {side:?} address"));
            }
        }
        Ok(())
    }

    /// Tells whether a table has a chain.
    pub fn has_chain(&self, id: TableId, name: &ChainName) -> bool {
        self.chains.contains_key(&(id, name.clone()))
    }

    fn condition(&self, id: TableId, condition: &Match, protocol: Option<u8>) -> Result<(), String> {
        let fits = match condition {
            Match::Set { set, with_port, .. } => {
                let Some(set) = self.sets.get(set) else { return Err(format!("set {set} is not there")) };
                (set.spec.kind == SetKind::AddressPort) == *with_port && set.spec.family == id.family
            }
            Match::Ports { ports, .. } => {
                let slots: usize = ports.iter().map(|range| if range.first == range.last { 1 } else { 2 }).sum();
                let in_order = ports.iter().all(|range| range.first <= range.last);
                protocol.is_some_and(|number| PORT_PROTOCOLS.contains(&number))
                    && (1..=MAX_PORT_SLOTS).contains(&slots)
                    && in_order
            }
            Match::DestinationPort(_) => protocol.is_some_and(|number| PORT_PROTOCOLS.contains(&number)),
            Match::Icmp { family, .. } => {
                let own = match family {
                    Family::V4 => 1,
                    Family::V6 => 58,
                };
                *family == id.family && protocol == Some(own)
            }
            Match::Net { net, negated, .. } => {
                Family::of(net) == id.family && net.trunc() == *net && !(*negated && net.prefix_len() == 0)
            }
            Match::Address { address, .. } => address.is_ipv4() == (id.family == Family::V4),
            Match::Protocol { protocol, .. } => protocol.number().is_some_and(|number| number != 0),
            Match::MarkClear(_)
            | Match::MarkAny(_)
            | Match::MarkIs { .. }
            | Match::MarkIsNot { .. }
            | Match::In(_)
            | Match::Out(_)
            | Match::ReversePathFailed
            | Match::LocalAddress { .. }
            | Match::ConnTrack { .. }
            | Match::Limit { .. } => true,
        };
        if fits { Ok(()) } else { Err(format!("{condition:?} would be refused")) }
    }
}

/// How many words a match is, at most.
const fn words(condition: &Match) -> usize {
    if matches!(condition, Match::Net { .. } | Match::Protocol { .. } | Match::In(_) | Match::Out(_)) { 3 } else { 6 }
}

/// Whether the kernel takes the members of a set.
pub(super) fn members(spec: &SetSpec, members: &Members) -> Result<(), String> {
    for member in members.iter() {
        let is_of_kind = match (spec.kind, member) {
            (SetKind::Address, Member::Address(address)) => !address.is_unspecified(),
            (SetKind::Net, Member::Net(net)) => net.prefix_len() > 0,
            (SetKind::AddressPort, Member::AddressPort { address, .. }) => !address.is_unspecified(),
            _ => false,
        };
        if !is_of_kind || member.family() != spec.family {
            return Err(format!("set {} of {} {:?} does not take {member:?}", spec.name, spec.family, spec.kind));
        }
    }
    Ok(())
}
