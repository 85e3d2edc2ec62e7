//! The walk through a list (policy.md 3.3).

use model::{Action, Rule};

use crate::endpoint::{EndpointKey, List, Settings, Subject};
use crate::facts::Facts;
use crate::lists::{self, TierOf};
use crate::packet::{Connection, Direction, Packet};
use crate::reason::{Contribution, Forwarded, Outcome, Reason, RuleOwner, RulePlace, Step, Verdict};
use crate::rule;

/// Whether a verdict comes with the steps that led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    Off,
    On,
}

/// Facts, settings, and how much to tell.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    facts: &'a Facts,
    settings: &'a Settings,
    trace: Trace,
}

/// How a policy or a profile ended.
enum End {
    Decided(Outcome, Reason),
    Passed,
    NoMatch,
}

/// One walk.
struct Walk<'a> {
    judge: Judge<'a>,
    packet: &'a Packet,
    list: List,
    direction: Direction,
    steps: Vec<Step>,
}

impl<'a> Judge<'a> {
    #[must_use]
    pub const fn new(facts: &'a Facts, settings: &'a Settings) -> Self {
        Self { facts, settings, trace: Trace::Off }
    }

    #[must_use]
    pub const fn trace(self, trace: Trace) -> Self {
        Self { trace, ..self }
    }

    /// Returns what a list of an endpoint says about a packet; `None` if there is no such endpoint.
    pub fn judge(&self, key: &EndpointKey, list: List, direction: Direction, packet: &Packet) -> Option<Verdict> {
        Some(self.judge_at(&Subject::find(self.facts, key)?, list, direction, packet))
    }

    /// See [`Self::judge`].
    pub fn judge_at(&self, subject: &Subject<'a>, list: List, direction: Direction, packet: &Packet) -> Verdict {
        let mut walk = Walk { judge: *self, packet, list, direction, steps: Vec::new() };
        let (outcome, reason) = walk.list(subject);
        Verdict { outcome, reason, endpoint: Some(subject.key.clone()), list, direction, steps: walk.steps }
    }

    /// Returns what becomes of a packet that passes through a host, given the interfaces it comes from and
    /// goes to (T-23). Asked in this order, as far as they exist: the forward list of the host endpoint that
    /// it arrives at, the workload that sends it, the workload that receives it, the forward list of the host
    /// endpoint that it leaves through. Without any, there is no verdict.
    ///
    /// Whoever denies ends the walk, and so does whoever finds a known connection, because it is accepted at
    /// once (netfilter.md 8.2, row 5b). Otherwise the last that is asked decides whether the packet is allowed
    /// (14.3). The untracked and pre-DNAT lists come before all this and are not asked.
    pub fn judge_forwarded(&self, host: &str, from: &str, to: &str, packet: &Packet) -> Forwarded {
        let mut forwarded = Forwarded { packet: *packet, outcome: Outcome::NoVerdict, verdicts: Vec::new() };
        let asked = [
            (List::Forward, from, Direction::Ingress),
            (List::Normal, from, Direction::Egress),
            (List::Normal, to, Direction::Ingress),
            (List::Forward, to, Direction::Egress),
        ];
        for (list, interface, direction) in asked {
            let verdict = match list {
                List::Forward => self.at_host(host, interface, direction, packet),
                List::Normal | List::Untracked | List::PreDnat => self.at_workload(host, interface, direction, packet),
            };
            let Some(verdict) = verdict else { continue };
            let ends = verdict.outcome == Outcome::Deny || verdict.reason == Reason::KnownConnection;
            forwarded.outcome = verdict.outcome;
            forwarded.verdicts.push(verdict);
            if ends {
                break;
            }
        }
        forwarded
    }

    fn at_host(&self, host: &str, interface: &str, direction: Direction, packet: &Packet) -> Option<Verdict> {
        let addresses = self.settings.interface_addresses.get(interface).map_or(&[][..], Vec::as_slice);
        let name = self.facts.host_owner(host, interface, addresses)?;
        self.judge(&EndpointKey::Host(name.clone()), List::Forward, direction, packet)
    }

    /// `None` if the interface is not one of workloads.
    fn at_workload(&self, host: &str, interface: &str, direction: Direction, packet: &Packet) -> Option<Verdict> {
        if !self.settings.is_workload_interface(interface) {
            return None;
        }
        let owner = self.facts.owner(host, interface).map(|key| EndpointKey::Workload(key.clone()));
        let verdict = owner.and_then(|key| self.judge(&key, List::Normal, direction, packet));
        Some(verdict.unwrap_or_else(|| Verdict {
            outcome: Outcome::Deny,
            reason: Reason::NoEndpoint { interface: interface.into() },
            endpoint: None,
            list: List::Normal,
            direction,
            steps: Vec::new(),
        }))
    }
}

impl<'a> Walk<'a> {
    fn list(&mut self, subject: &Subject<'a>) -> (Outcome, Reason) {
        if !subject.active {
            return (Outcome::Deny, Reason::Inactive);
        }
        let is_unused = subject.is_workload() && self.list != List::Normal;
        if is_unused || (subject.is_wildcard && self.list == List::Untracked) {
            // T-11, T-24.
            return (Outcome::NoVerdict, Reason::Undecided);
        }
        if let Some(decided) = self.before_the_tiers(subject) {
            return decided;
        }
        let tiers = lists::tiers(self.judge.facts, subject, self.list);
        for tier in &tiers {
            if let Some(decided) = self.tier(tier) {
                return decided;
            }
        }
        match self.list {
            List::Normal => self.profiles(subject),
            List::Forward if tiers.is_empty() => (Outcome::Allow, Reason::NoForwardPolicy),
            List::Forward | List::Untracked | List::PreDnat => (Outcome::NoVerdict, Reason::Undecided),
        }
    }

    /// T-18, T-19.
    fn before_the_tiers(&self, subject: &Subject<'_>) -> Option<(Outcome, Reason)> {
        let Self { judge: Judge { settings, .. }, packet, list, direction, .. } = self;
        if *list != List::Untracked {
            match packet.connection {
                Connection::Established | Connection::Related => {
                    return Some((Outcome::Allow, Reason::KnownConnection));
                }
                Connection::Invalid if settings.check_invalid => {
                    return Some((Outcome::Deny, Reason::InvalidConnection));
                }
                Connection::Invalid | Connection::New => {}
            }
        }
        if !subject.is_workload() {
            let entry = settings.failsafe(*list, *direction, packet)?;
            return Some((Outcome::Allow, Reason::Failsafe(entry.clone())));
        }
        let tunnel = settings.blocked_tunnel(packet).filter(|_| *direction == Direction::Egress)?;
        Some((Outcome::Deny, Reason::Tunnel(tunnel)))
    }

    fn tier(&mut self, tier: &TierOf<'a>) -> Option<(Outcome, Reason)> {
        let policies: Vec<_> =
            tier.policies.iter().filter(|(_, policy)| lists::governs(policy, self.list, self.direction)).collect();
        if policies.is_empty() {
            // T-14.
            return None;
        }
        let is_missing = tier.stored.is_none();
        self.step(|| Step::Tier { tier: tier.name.clone(), is_missing });
        let mut decides = false;
        for (key, policy) in policies {
            if key.kind.is_staged() {
                self.step(|| Step::Staged((*key).clone()));
                continue;
            }
            decides = true;
            let rules = self.rules(&policy.inbound, &policy.outbound);
            let owner = || RuleOwner::Policy { tier: tier.name.clone(), key: (*key).clone() };
            match self.walk(rules, &owner) {
                End::Decided(outcome, reason) => return Some((outcome, reason)),
                End::Passed => return None,
                End::NoMatch => {}
            }
        }
        if decides && matches!(self.list, List::Normal | List::Forward) && tier.denies_at_its_end() {
            return Some((Outcome::Deny, Reason::EndOfTier { tier: tier.name.clone(), is_missing }));
        }
        self.step(|| Step::TierPasses(tier.name.clone()));
        None
    }

    /// T-16, A-6, and R-7 in the way it is required.
    fn profiles(&mut self, subject: &Subject<'a>) -> (Outcome, Reason) {
        for name in subject.profiles {
            let Some(profile) = self.judge.facts.profile_rules(name) else {
                return (Outcome::Deny, Reason::MissingProfile(name.clone()));
            };
            self.step(|| Step::Profile(name.clone()));
            let rules = self.rules(&profile.inbound, &profile.outbound);
            match self.walk(rules, &|| RuleOwner::Profile(name.clone())) {
                End::Decided(outcome, reason) => return (outcome, reason),
                End::Passed | End::NoMatch => {}
            }
        }
        (Outcome::Deny, Reason::NothingAllowed)
    }

    ///
    fn rules(&self, inbound: &'a [Rule], outbound: &'a [Rule]) -> &'a [Rule] {
        match self.direction {
            Direction::Ingress => inbound,
            Direction::Egress => outbound,
        }
    }

    ///
    fn walk(&mut self, rules: &[Rule], owner: &dyn Fn() -> RuleOwner) -> End {
        let direction = self.direction;
        for (index, rule) in rules.iter().enumerate() {
            let place = || RulePlace { owner: owner(), direction, index };
            let contributions = match rule::meets(self.judge.facts, rule, self.packet) {
                Ok(contributions) => contributions,
                Err(because) => {
                    self.step(|| Step::NotMatched { rule: place(), because });
                    continue;
                }
            };
            let reason = |contributions: Vec<Contribution>| Reason::Rule { rule: place(), contributions };
            match rule.action {
                Action::Allow => return End::Decided(Outcome::Allow, reason(contributions)),
                Action::Deny => return End::Decided(Outcome::Deny, reason(contributions)),
                Action::Pass => {
                    self.step(|| Step::Passed { rule: place(), contributions });
                    return End::Passed;
                }
                Action::Log => self.step(|| Step::Logged { rule: place(), contributions }),
            }
        }
        End::NoMatch
    }

    fn step(&mut self, step: impl FnOnce() -> Step) {
        if self.judge.trace == Trace::On {
            self.steps.push(step());
        }
    }
}
