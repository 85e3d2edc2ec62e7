//! A host with both opinions on it.

use std::net::IpAddr;

use compiler::options::{AllowAction, DenyAction, EndpointToHost};
use compiler::{Compiler, Marks, Options};
use graph::Graph;
use model::Update;
use program::{Changes, Origin};
use testkit::interpret::{Bits, Fate, Journey, Kernel, Passage, Way};
use testkit::world::{Dice, Domain, HOST, Trip};
use verdict::{Direction, Facts, Forwarded, Judge, Outcome, Packet, Reason, RuleOwner, RulePlace, Settings, Trace};

use crate::coverage::Seen;

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Bench {
    options: Options,
    settings: Settings,
    facts: Facts,
    graph: Graph,
    compiler: Compiler,
    pub(crate) kernel: Kernel,
}

/// A packet, and what else the kernel knows of it.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) trip: Trip,
    /// It is not forwarded: it is for the host itself.
    to_host: bool,
    /// What others have marked it with, and what they left of ours.
    mark: u32,
    reverse_path_failed: bool,
}

impl Probe {
    /// A packet that nothing else is to be known of.
    pub(crate) const fn plain(trip: Trip) -> Self {
        Self { trip, to_host: false, mark: 0, reverse_path_failed: false }
    }

    pub(crate) fn draw(domain: &Domain, dice: &mut Dice) -> Self {
        let trip = domain.trip(dice);
        Self { trip, to_host: dice.one_in(6), mark: dice.roll(1 << 32) as u32, reverse_path_failed: dice.one_in(20) }
    }
}

/// Options that change how chains look.
pub(crate) fn options_of(dice: &mut Dice) -> Options {
    let masks = [0xffff_0000, 0x0000_ffff, 0x0101_0111, 0xf800_0000];
    let rate = program::Rate { count: 10, per: program::RateUnit::Second };
    Options {
        marks: Marks::allocate(dice.pick(&masks), false, false).unwrap(),
        filter_deny: dice.pick(&[DenyAction::Drop, DenyAction::Reject]),
        check_invalid: !dice.one_in(4),
        allow_vxlan_from_workloads: dice.one_in(4),
        allow_ipip_from_workloads: dice.one_in(4),
        openstack: dice.one_in(4),
        flow_logs: dice.one_in(4),
        log_rate: dice.one_in(4).then_some(rate),
        endpoint_to_host: dice.pick(&[EndpointToHost::Drop, EndpointToHost::Accept, EndpointToHost::Return]),
        filter_allow: AllowAction::Accept,
        ..Options::default()
    }
}

fn settings_of(options: &Options) -> Settings {
    Settings {
        interface_prefixes: options.interface_prefixes.iter().map(|prefix| prefix.as_str().into()).collect(),
        check_invalid: options.check_invalid,
        vxlan_port: options.vxlan_port,
        allow_vxlan_from_workloads: options.allow_vxlan_from_workloads,
        allow_ipip_from_workloads: options.allow_ipip_from_workloads,
        ..Settings::default()
    }
}

impl Bench {
    pub(crate) fn new(options: Options) -> Self {
        let marks = &options.marks;
        let bits = Bits { ours: marks.all() | marks.drop, never_left: marks.drop };
        Self {
            settings: settings_of(&options),
            facts: Facts::new(),
            graph: Graph::new(HOST.into()),
            compiler: Compiler::new(options.clone()),
            kernel: Kernel::new(bits),
            options,
        }
    }

    pub(crate) const fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn apply(&mut self, batch: &[Update]) -> Result<Changes, String> {
        for update in batch {
            self.facts.put(update.clone());
            self.graph.apply(update.clone());
        }
        let (changes, complaints) = self.compiler.compile(&self.graph.take_batch());
        // Histories give one address to several endpoints on purpose; everything else can be programmed.
        let complaints: Vec<_> =
            complaints.into_iter().filter(|complaint| !complaint.object.starts_with("destination ")).collect();
        if !complaints.is_empty() {
            return Err(format!("{complaints:?}"));
        }
        self.kernel.apply(&changes).map_err(|fault| fault.to_string())?;
        Ok(changes)
    }

    /// The words of all that the compiler holds, without its account of work done. They are sorted, because some of it
    /// has no order.
    pub(crate) fn memory(&self) -> Vec<String> {
        let text = format!("{:?}", self.compiler);
        let (held, _) = text.rsplit_once("work: Work").expect("the last field");
        let mut words: Vec<String> = held.split(|c: char| " ,{}[]()".contains(c)).map(str::to_owned).collect();
        words.sort_unstable();
        words
    }

    /// What the program makes of a packet.
    pub(crate) fn fate(&self, probe: &Probe) -> Result<Fate, String> {
        self.walk(probe).map(|journey| journey.fate)
    }

    /// Compares the two opinions.
    pub(crate) fn judge(&self, probe: &Probe, seen: &mut Seen) -> Result<(), String> {
        let (expected, fate) = self.expect(probe, Trace::Off);
        let got = self.walk(probe);
        let disagreement = match &got {
            Ok(journey) => disagreement(&expected, fate, journey),
            Err(fault) => Some(fault.clone()),
        };
        if let Some(disagreement) = disagreement {
            let (told, _) = self.expect(probe, Trace::On);
            let told = told.map_or_else(|before| before.to_owned(), |told| told.to_string());
            return Err(format!("{disagreement}\n{probe:?}\n{told}\nprogram: {got:?}"));
        }
        seen.note(&self.facts, &expected, fate);
        Ok(())
    }

    /// What policy says, or what comes before it, and what the packet filter makes of that.
    fn expect(&self, probe: &Probe, trace: Trace) -> (Result<Forwarded, &'static str>, Fate) {
        let Trip { from, to, packet } = &probe.trip;
        let judge = Judge::new(&self.facts, &self.settings).trace(trace);
        let is_workload = self.settings.is_workload_interface(from);
        let is_dhcp = self.options.openstack && is_dhcp_discover(packet);
        if probe.reverse_path_failed && is_workload && !is_dhcp && !self.may_spoof(from, packet.source) {
            return (Err("reverse path"), Fate::Dropped);
        }
        let to = if probe.to_host { "" } else { to };
        if probe.to_host && is_workload && self.is_open_to_workloads(packet) {
            return (Err("service of the host"), Fate::Accepted);
        }
        let forwarded = judge.judge_forwarded(HOST, from, to, packet);
        let is_known = forwarded.verdicts.last().is_some_and(|verdict| verdict.reason == Reason::KnownConnection);
        let fate = match (forwarded.outcome, self.options.endpoint_to_host) {
            (Outcome::Deny, _) => Fate::Dropped,
            (Outcome::NoVerdict, _) => Fate::Left,
            // T-23.
            (Outcome::Allow, EndpointToHost::Drop) if probe.to_host && !is_known => Fate::Dropped,
            (Outcome::Allow, EndpointToHost::Return) if probe.to_host && !is_known => Fate::Left,
            (Outcome::Allow, _) => Fate::Accepted,
        };
        (Ok(forwarded), fate)
    }

    /// netfilter.md 5.5, `cali-wl-to-host`, rows 1 to 4. No packet here is for the metadata service.
    fn is_open_to_workloads(&self, packet: &Packet) -> bool {
        let router = [130, 131, 132, 133, 135, 136];
        let discovers = packet.protocol == 58 && packet.icmp.is_some_and(|(kind, _)| router.contains(&kind));
        let asks = packet.protocol == 17 && packet.ports.is_some_and(|(_, port)| port == 53);
        (discovers && packet.source.is_ipv6()) || (asks && self.options.openstack)
    }

    /// netfilter.md 13.6.
    fn may_spoof(&self, interface: &str, source: IpAddr) -> bool {
        let owner = self.facts.owner(HOST, interface).and_then(|key| self.facts.workload(key));
        owner.is_some_and(|owner| owner.allowed_spoofed.iter().any(|net| net.contains(&source)))
    }

    fn walk(&self, probe: &Probe) -> Result<Journey, String> {
        let Trip { from, to, packet } = &probe.trip;
        let passage = Passage {
            way: if probe.to_host { Way::ToHost } else { Way::Forward },
            from,
            to: if probe.to_host { "" } else { to },
            packet: *packet,
            // Nobody else may set this bit; the program trusts it.
            mark: probe.mark & !self.options.marks.drop,
            reverse_path_failed: probe.reverse_path_failed,
            translated: false,
            local: &[],
        };
        self.kernel.walk(passage).map_err(|fault| fault.to_string())
    }
}

/// netfilter.md 5.2, row 6.
fn is_dhcp_discover(packet: &Packet) -> bool {
    packet.protocol == 17 && packet.source.is_ipv4() && packet.source.is_unspecified() && packet.ports == Some((68, 67))
}

fn disagreement(expected: &Result<Forwarded, &str>, fate: Fate, journey: &Journey) -> Option<String> {
    if journey.fate != fate {
        return Some(format!("policy says {fate:?}, the program {:?}", journey.fate));
    }
    // The program knows for every rule where it comes from.
    let Reason::Rule { rule, .. } = &expected.as_ref().ok()?.verdicts.last()?.reason else { return None };
    let origin = Some(origin_of(rule));
    (journey.last_origin != origin).then(|| format!("policy decides by {rule}, the program by another rule"))
}

fn origin_of(rule: &RulePlace) -> Origin {
    let direction = match rule.direction {
        Direction::Ingress => program::Direction::Ingress,
        Direction::Egress => program::Direction::Egress,
    };
    let index = rule.index as u32;
    match &rule.owner {
        RuleOwner::Policy { key, .. } => Origin::Policy { key: key.clone(), direction, index },
        RuleOwner::Profile(name) => Origin::Profile { name: name.clone(), direction, index },
    }
}

/// Returns what is left of a history if everything is taken out of it that the disagreement does not need.
pub(crate) fn smallest_cause(options: &Options, history: Vec<Update>, probe: &Probe) -> String {
    let mut left: Vec<Update> = testkit::naive::facts(history.clone()).into_values().collect();
    let disagrees = |updates: &[Update]| {
        let mut bench = Bench::new(options.clone());
        bench.apply(updates).is_ok() && bench.judge(probe, &mut Seen::default()).is_err()
    };
    if !disagrees(&left) {
        return format!("(only after this history)\n{history:#?}");
    }
    let mut at = 0;
    while at < left.len() {
        let mut fewer = left.clone();
        fewer.remove(at);
        if disagrees(&fewer) { left = fewer } else { at += 1 }
    }
    let mut bench = Bench::new(options.clone());
    let changes = bench.apply(&left);
    let chains = changes.iter().flat_map(|changes| &changes.tables).flat_map(|(id, table)| {
        let chains = table.chains.iter().filter(|(name, _)| !name.as_str().contains("failsafe"));
        chains.map(move |(name, chain)| format!("{id:?} {name}: {:#?}", chain.as_ref().map(|chain| &chain.rules)))
    });
    format!("{left:#?}\n{}", chains.collect::<Vec<_>>().join("\n"))
}
