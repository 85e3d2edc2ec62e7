//! Chains of one endpoint and of policy groups (netfilter.md 8, 9).
//!
//! Fed with an endpoint's tiers and profiles, feeds the table programs of [`crate::uses`]. The same
//! rows serve workloads and host endpoints; [`workload_chains`] picks those of a workload.
//!
//! Invariants: a chain never depends on what is in a policy or profile, only on which there are
//! (8.3); a normal chain ends with a deny. Nothing depends on the family.

use graph::{EndpointProgram, PolicyRef, TierProgram};
use model::{Name, PolicyKey, WorkloadEndpoint};
use program::{Action, Chain, ChainName, ConnState, Direction, Match, Rate, RateUnit, Rule, Table};

use crate::names;
use crate::options::{AllowAction, Options};
use crate::policy::{direction_word, flow_log_group};

/// A group chain gives its caller a chance to leave after this many policies (9.2).
const GROUP_STRIDE: usize = 5;

/// Largest rate per second and largest burst of `-m limit` (netfilter.md 4.2).
pub const MAX_RATE: u32 = 10_000;

/// What an endpoint chain is for (8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Forward,
    Untracked,
    PreDnat,
}

/// Limits on the traffic of one direction; 0 means none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Packets per second.
    pub rate: u32,
    pub burst: u32,
    pub connections: u32,
}

/// One chain of one endpoint.
#[derive(Clone, Debug)]
pub struct EndpointChain<'a> {
    pub name: ChainName,
    pub table: Table,
    pub kind: Kind,
    /// Whose policies: ingress is towards a workload, but from a host endpoint's interface.
    pub direction: Direction,
    pub tiers: &'a [TierProgram],
    pub profiles: &'a [Name],
    pub failsafe: Option<&'static str>,
    /// What happens to packets of known connections; not used by [`Kind::Untracked`].
    pub established: AllowAction,
    /// Tunnelled packets are blocked, as far as the options say.
    pub block_tunnels: bool,
    pub limits: Limits,
}

/// A run of neighbouring policies with the same selector (9.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub direction: Direction,
    /// Without the staged ones.
    pub policies: Vec<PolicyKey>,
}

/// The group chains that an endpoint's chains jump to.
pub type Groups = Vec<(ChainName, Group)>;

/// Returns the chains of a workload: to it, from it, and the one that marks its packets if it has a
/// mark. `groups` receives the groups that they refer to.
pub fn workload_chains(
    options: &Options,
    interface: &str,
    program: &EndpointProgram,
    mark: Option<u32>,
    groups: &mut Groups,
) -> Vec<Chain> {
    let lists = WorkloadLists::of(&program.tiers);
    groups.extend(lists.groups().cloned());
    workload_chains_with(options, interface, program, mark, &lists)
}

/// What the chains of workloads with the same tiers jump to. Made once for all of them: the lists can be
/// thousands of policies long.
#[derive(Clone, Debug)]
pub struct WorkloadLists {
    ingress: Targets,
    egress: Targets,
}

impl WorkloadLists {
    pub fn of(tiers: &[TierProgram]) -> Self {
        Self { ingress: Targets::of(tiers, Direction::Ingress), egress: Targets::of(tiers, Direction::Egress) }
    }

    /// The groups that are jumped to.
    pub fn groups(&self) -> impl Iterator<Item = &(ChainName, Group)> {
        self.ingress.groups.iter().chain(&self.egress.groups)
    }
}

/// As [`workload_chains`]; `lists` are those of the program's tiers.
pub fn workload_chains_with(
    options: &Options,
    interface: &str,
    program: &EndpointProgram,
    mark: Option<u32>,
    lists: &WorkloadLists,
) -> Vec<Chain> {
    let endpoint = program.endpoint.as_ref();
    let chain = |name: ChainName, direction, block_tunnels| {
        if !endpoint.active {
            let deny = Rule::new(Vec::new(), options.deny(Table::Filter)).comment("Endpoint admin disabled");
            return Chain { name, rules: vec![deny] };
        }
        let chain = EndpointChain {
            name,
            table: Table::Filter,
            kind: Kind::Normal,
            direction,
            tiers: &program.tiers,
            profiles: &endpoint.profiles,
            failsafe: None,
            established: options.filter_allow,
            block_tunnels,
            limits: Limits::of(endpoint, direction),
        };
        let targets = match direction {
            Direction::Ingress => &lists.ingress,
            Direction::Egress => &lists.egress,
        };
        chain_to(options, &chain, targets)
    };
    let to = chain(names::chain(names::TO_WORKLOAD, interface), Direction::Ingress, false);
    let from = chain(names::chain(names::FROM_WORKLOAD, interface), Direction::Egress, true);
    let mut chains = vec![to, from];
    if options.ipvs {
        chains.push(set_mark_chain(options, interface, mark));
    }
    chains
}

/// Returns the chain that marks packets of an endpoint (7.4); without a mark it has no rule.
pub fn set_mark_chain(options: &Options, interface: &str, mark: Option<u32>) -> Chain {
    let mask = options.marks.endpoint;
    let rule = mark.map(|value| Rule::new(Vec::new(), Action::SetMaskedMark { value, mask }));
    Chain { name: names::chain(names::SET_MARK, interface), rules: rule.into_iter().collect() }
}

impl Limits {
    /// The limits of one direction of a workload, cut to what the kernel takes.
    pub fn of(endpoint: &WorkloadEndpoint, direction: Direction) -> Self {
        let Some(qos) = endpoint.qos.as_deref() else { return Self::default() };
        let (rate, burst, connections) = match direction {
            Direction::Ingress => (qos.ingress_packet_rate, qos.ingress_packet_burst, qos.ingress_max_connections),
            Direction::Egress => (qos.egress_packet_rate, qos.egress_packet_burst, qos.egress_max_connections),
        };
        Self { rate: rate.min(MAX_RATE), burst: burst.min(MAX_RATE), connections }
    }

    /// True if a limit of the endpoint is above what the kernel takes.
    pub fn exceeded(endpoint: &WorkloadEndpoint) -> bool {
        endpoint.qos.as_deref().is_some_and(|qos| {
            let rates =
                [qos.ingress_packet_rate, qos.ingress_packet_burst, qos.egress_packet_rate, qos.egress_packet_burst];
            rates.iter().any(|rate| *rate > MAX_RATE)
        })
    }
}

/// Returns one chain of an endpoint (8.2). `groups` receives the groups that it refers to.
pub fn endpoint_chain(options: &Options, chain: &EndpointChain<'_>, groups: &mut Groups) -> Chain {
    let targets = Targets::of(chain.tiers, chain.direction);
    let chain = chain_to(options, chain, &targets);
    groups.extend(targets.groups);
    chain
}

fn chain_to(options: &Options, chain: &EndpointChain<'_>, targets: &Targets) -> Chain {
    let mut rows = Rows { options, chain, rules: Vec::new() };
    rows.packet_rate();
    rows.connection_state();
    rows.connection_limit();
    if let Some(failsafe) = chain.failsafe {
        rows.push(Vec::new(), Action::Jump(ChainName::fixed(failsafe)));
    }
    rows.push(Vec::new(), Action::ClearMark(options.marks.verdict()));
    rows.tunnels();
    for (tier, targets) in chain.tiers.iter().zip(&targets.by_tier) {
        rows.tier(tier, targets);
    }
    rows.end();
    let name = chain.name.clone();
    Chain { name, rules: rows.rules }
}

/// Collects the rows of a chain.
struct Rows<'a> {
    options: &'a Options,
    chain: &'a EndpointChain<'a>,
    rules: Vec<Rule>,
}

impl Rows<'_> {
    fn push(&mut self, matches: Vec<Match>, action: Action) {
        self.rules.push(Rule::new(matches, action));
    }

    fn commented(&mut self, matches: Vec<Match>, action: Action, comment: String) {
        self.rules.push(Rule::new(matches, action).comment(comment));
    }

    fn deny(&mut self, matches: Vec<Match>, comment: &str) {
        let table = self.chain.table;
        let comment = comment.replace("{Deny}", self.options.deny_word(table));
        self.commented(matches, self.options.deny(table), comment);
    }

    /// Rows 1 to 4.
    fn packet_rate(&mut self) {
        let Limits { rate, burst, connections: _ } = self.chain.limits;
        if self.chain.kind != Kind::Normal || rate == 0 {
            return;
        }
        let mark = self.options.marks.scratch0;
        let way = direction_word(self.chain.direction);
        let rate = Rate { count: rate, per: RateUnit::Sec };
        let clear = || format!("Clear {way} packet rate limit mark");
        self.commented(Vec::new(), Action::ClearMark(mark), clear());
        self.commented(
            Vec::new(),
            Action::MarkWithinRate { rate, burst, mark },
            format!("Mark packets within {way} packet rate limit"),
        );
        self.commented(
            vec![Match::MarkIsNot { value: mark, mask: mark }],
            Action::Drop,
            format!("Drop packets over {way} packet rate limit"),
        );
        self.commented(Vec::new(), Action::ClearMark(mark), clear());
    }

    /// Rows 5a to 5c.
    fn connection_state(&mut self) {
        if self.chain.kind == Kind::Untracked {
            return;
        }
        let known = || {
            let states = vec![ConnState::Related, ConnState::Established];
            vec![Match::ConnTrack { negated: false, states }]
        };
        if self.chain.established != AllowAction::Accept {
            self.push(known(), Action::SetMark(self.options.marks.accept));
        }
        self.push(known(), self.chain.established.action());
        if self.options.check_invalid {
            let invalid = Match::ConnTrack { negated: false, states: vec![ConnState::Invalid] };
            self.push(vec![invalid], self.options.deny(self.chain.table));
        }
    }

    /// Row 6.
    fn connection_limit(&mut self) {
        let connections = self.chain.limits.connections;
        if self.chain.kind == Kind::Normal && connections > 0 {
            let way = direction_word(self.chain.direction);
            let comment = format!("Reject connections over {way} connection limit");
            self.commented(Vec::new(), Action::RejectConnectionsAbove(connections), comment);
        }
    }

    /// Rows 8 and 9.
    fn tunnels(&mut self) {
        if !self.chain.block_tunnels {
            return;
        }
        if !self.options.allow_vxlan_from_workloads {
            let ports = vec![program::PortRange::single(self.options.vxlan_port)];
            let vxlan = vec![
                Match::Protocol { negated: false, protocol: program::Protocol::Number(17) },
                Match::Ports { side: program::Side::Destination, negated: false, ports },
            ];
            self.deny(vxlan, "{Deny} VXLAN encapped packets originating in workloads");
        }
        if !self.options.allow_ipip_from_workloads {
            let ipip = Match::Protocol { negated: false, protocol: program::Protocol::Number(4) };
            self.deny(vec![ipip], "{Deny} IPinIP encapped packets originating in workloads");
        }
    }

    /// Section 9.3.
    fn tier(&mut self, tier: &TierProgram, targets: &[ChainName]) {
        let policies = match self.chain.direction {
            Direction::Ingress => &tier.ingress,
            Direction::Egress => &tier.egress,
        };
        if policies.is_empty() {
            return;
        }
        let marks = &self.options.marks;
        let (accept, pass) = (marks.accept, marks.pass);
        self.commented(Vec::new(), Action::ClearMark(pass), format!("Start of tier {}", tier.name));
        for target in targets {
            self.push(vec![Match::MarkClear(pass)], Action::Jump(target.clone()));
            let accepted = || vec![Match::MarkIs { value: accept, mask: accept }];
            if self.chain.kind == Kind::Untracked {
                self.push(accepted(), Action::NoTrack);
            }
            self.commented(accepted(), Action::Return, "Return if policy accepted".to_owned());
        }
        if !matches!(self.chain.kind, Kind::Normal | Kind::Forward) {
            return;
        }
        let decides = policies.iter().any(|policy| !policy.key.kind.is_staged());
        if decides && !tier.default_pass {
            self.flow_log(vec![Match::MarkClear(pass)], 'D', 'P', Some(&tier.name));
            let comment = format!("End of tier {}. {{Deny}} if no policies passed packet", tier.name);
            self.deny(vec![Match::MarkClear(pass)], &comment);
        } else {
            self.flow_log(vec![Match::MarkClear(pass)], 'P', 'P', Some(&tier.name));
        }
    }

    /// Rows 11 to 14.
    fn end(&mut self) {
        let accept = self.options.marks.accept;
        match self.chain.kind {
            Kind::Normal => {
                for profile in self.chain.profiles {
                    let chain = names::profile_chain(profile, self.chain.direction);
                    self.push(Vec::new(), Action::Jump(chain));
                    let accepted = vec![Match::MarkIs { value: accept, mask: accept }];
                    self.commented(accepted, Action::Return, "Return if profile accepted".to_owned());
                }
                self.flow_log(Vec::new(), 'D', 'R', None);
                self.deny(Vec::new(), "{Deny} if no profiles matched");
            }
            Kind::Forward if self.chain.tiers.is_empty() => {
                let comment = "Allow forwarded traffic by default".to_owned();
                self.commented(Vec::new(), Action::SetMark(accept), comment);
                self.commented(Vec::new(), Action::Return, "Return for accepted forward traffic".to_owned());
            }
            Kind::Forward | Kind::Untracked | Kind::PreDnat => {}
        }
    }

    fn flow_log(&mut self, matches: Vec<Match>, verdict: char, by: char, tier: Option<&str>) {
        if !self.options.flow_logs {
            return;
        }
        let (group, way) = flow_log_group(self.chain.direction);
        let prefix = match tier {
            Some(tier) => format!("{verdict}{by}{way}|{tier}"),
            None => format!("{verdict}{by}{way}"),
        };
        self.push(matches, Action::NfLog { group, prefix: names::flow_log_prefix(&prefix) });
    }
}

/// What a chain of an endpoint jumps to.
#[derive(Clone, Debug)]
struct Targets {
    /// As many as there are tiers.
    by_tier: Vec<Vec<ChainName>>,
    groups: Groups,
}

impl Targets {
    fn of(tiers: &[TierProgram], direction: Direction) -> Self {
        let mut groups = Groups::new();
        let policies = tiers.iter().map(|tier| match direction {
            Direction::Ingress => &tier.ingress,
            Direction::Egress => &tier.egress,
        });
        let by_tier = policies.map(|policies| targets(policies, direction, &mut groups)).collect();
        Self { by_tier, groups }
    }
}

/// Returns what an endpoint chain jumps to for one tier, in order: policies, and groups of at least two
/// policies that decide something (9.1).
fn targets(policies: &[PolicyRef], direction: Direction, groups: &mut Groups) -> Vec<ChainName> {
    let mut targets = Vec::with_capacity(policies.len());
    for run in policies.chunk_by(|a, b| a.original_selector == b.original_selector) {
        let deciding = || run.iter().map(|policy| &policy.key).filter(|key| !key.kind.is_staged());
        if deciding().count() < 2 || !run.iter().all(is_clear_in_group_name) {
            targets.extend(deciding().map(|key| names::policy_chain(key, direction)));
            continue;
        }
        let selector = run.first().map_or("", |policy| policy.original_selector.as_ref());
        let name = names::group_chain(selector, direction, run.iter().map(|policy| &policy.key));
        groups.push((name.clone(), Group { direction, policies: deciding().cloned().collect() }));
        targets.push(name);
    }
    targets
}

/// False for text that is not valid in a name or selector and that could make two groups share a chain.
fn is_clear_in_group_name(policy: &PolicyRef) -> bool {
    let odd = |c| matches!(c, '{' | '}' | ',' | '\n');
    let PolicyRef { key, original_selector } = policy;
    !key.name.contains(odd) && !key.namespace.contains(odd) && !original_selector.contains('\n')
}

/// Returns the chain of a group (9.2).
pub fn group_chain(options: &Options, name: ChainName, group: &Group) -> Chain {
    let verdict = options.marks.verdict();
    let mut rules = Vec::with_capacity(group.policies.len() + group.policies.len() / GROUP_STRIDE);
    for (index, key) in group.policies.iter().enumerate() {
        let starts_stride = index % GROUP_STRIDE == 0;
        if starts_stride && index > 0 {
            let leave = Rule::new(vec![Match::MarkAny(verdict)], Action::Return).comment("Return on verdict");
            rules.push(leave);
        }
        // At the start of a stride the bits are known to be clear.
        let matches = if starts_stride { Vec::new() } else { vec![Match::MarkClear(verdict)] };
        rules.push(Rule::new(matches, Action::Jump(names::policy_chain(key, group.direction))));
    }
    Chain { name, rules }
}
