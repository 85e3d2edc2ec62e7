//! Facts from short texts, with defaults for everything that a test is not about.
//!
//! ```text
//! wep("h1/openstack/vm1/eth0").ip("10.65.0.2").label("role=web").build()
//! policy("np/openstack/web").selector("has(sg-web)").ingress("allow tcp from has(sg-db) to-ports 5432").build()
//! ```
//!
//! Everything panics on texts that are wrong: this is for tests.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "builders are for tests")]

use std::sync::Arc;

use ipnet::IpNet;
use model::{
    Action, EndpointPort, EntityMatch, Family, HostEndpoint, IcmpMatch, Labels, LinkState, Name, NetworkSet, Policy,
    PolicyKey, PolicyKind, Port, PortRange, ProfileRules, Protocol, Rule, Selector, ServiceRef, Tier, Update,
    WorkloadEndpoint, WorkloadEndpointKey,
};

/// Starts a workload endpoint from `host/orchestrator/workload/endpoint`. Its interface is `tap-` and
/// the workload until [`WepBuilder::interface`] says otherwise.
pub fn wep(key: &str) -> WepBuilder {
    let key = wep_key(key);
    let interface = format!("tap-{}", key.workload).into();
    let value = WorkloadEndpoint { active: true, interface, ..WorkloadEndpoint::default() };
    WepBuilder { key, value, labels: Vec::new() }
}

/// Reads `host/orchestrator/workload/endpoint`; the workload may contain slashes.
pub fn wep_key(text: &str) -> WorkloadEndpointKey {
    let mut parts = text.split('/');
    let host = parts.next().expect("a host").into();
    let orchestrator = parts.next().expect("an orchestrator").into();
    let endpoint = parts.next_back().expect("an endpoint").into();
    let workload = parts.collect::<Vec<_>>().join("/").into();
    WorkloadEndpointKey { host, orchestrator, workload, endpoint }
}

/// See [`wep`].
#[derive(Clone, Debug)]
pub struct WepBuilder {
    key: WorkloadEndpointKey,
    value: WorkloadEndpoint,
    labels: Vec<(Name, Name)>,
}

impl WepBuilder {
    /// Adds an address of either family.
    #[must_use]
    pub fn ip(mut self, address: &str) -> Self {
        match address.parse::<std::net::IpAddr>().map(IpNet::from).or_else(|_| address.parse()) {
            Ok(IpNet::V4(net)) => self.value.v4_nets.push(net),
            Ok(IpNet::V6(net)) => self.value.v6_nets.push(net),
            Err(error) => panic!("address {address:?}: {error}"),
        }
        self
    }

    /// Adds a label `key=value`, or `key` with an empty value.
    #[must_use]
    pub fn label(mut self, label: &str) -> Self {
        self.labels.push(label_pair(label));
        self
    }

    /// Adds a profile behind those that are there.
    #[must_use]
    pub fn profile(mut self, name: &str) -> Self {
        self.value.profiles.push(name.into());
        self
    }

    #[must_use]
    pub fn interface(mut self, name: &str) -> Self {
        self.value.interface = name.into();
        self
    }

    /// Adds a named port `name/protocol/number`.
    #[must_use]
    pub fn port(mut self, text: &str) -> Self {
        self.value.ports.push(endpoint_port(text));
        self
    }

    /// Anything else.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut WorkloadEndpoint)) -> Self {
        change(&mut self.value);
        self
    }

    pub fn value(mut self) -> (WorkloadEndpointKey, Arc<WorkloadEndpoint>) {
        self.value.labels = self.labels.into_iter().collect();
        (self.key, Arc::new(self.value))
    }

    pub fn build(self) -> Update {
        let (key, value) = self.value();
        Update::WorkloadEndpoint(key, Some(value))
    }
}

fn label_pair(text: &str) -> (Name, Name) {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    (key.into(), value.into())
}

/// Starts a host endpoint of this name on this host. It is for the interface `eth0` until
/// [`HepBuilder::interface`] says otherwise.
pub fn hep(name: &str, host: &str) -> HepBuilder {
    let value = HostEndpoint { host: host.into(), interface: "eth0".into(), ..HostEndpoint::default() };
    HepBuilder { name: name.into(), value, labels: Vec::new() }
}

/// See [`hep`].
#[derive(Clone, Debug)]
pub struct HepBuilder {
    name: Name,
    value: HostEndpoint,
    labels: Vec<(Name, Name)>,
}

impl HepBuilder {
    /// Adds an expected address of either family.
    #[must_use]
    pub fn ip(mut self, address: &str) -> Self {
        match address.parse() {
            Ok(std::net::IpAddr::V4(address)) => self.value.expected_v4.push(address),
            Ok(std::net::IpAddr::V6(address)) => self.value.expected_v6.push(address),
            Err(error) => panic!("address {address:?}: {error}"),
        }
        self
    }

    /// Adds a label `key=value`, or `key` with an empty value.
    #[must_use]
    pub fn label(mut self, label: &str) -> Self {
        self.labels.push(label_pair(label));
        self
    }

    /// Adds a profile behind those that are there.
    #[must_use]
    pub fn profile(mut self, name: &str) -> Self {
        self.value.profiles.push(name.into());
        self
    }

    #[must_use]
    pub fn interface(mut self, name: &str) -> Self {
        self.value.interface = name.into();
        self
    }

    /// Adds a named port `name/protocol/number`.
    #[must_use]
    pub fn port(mut self, text: &str) -> Self {
        self.value.ports.push(endpoint_port(text));
        self
    }

    /// Anything else.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut HostEndpoint)) -> Self {
        change(&mut self.value);
        self
    }

    pub fn value(mut self) -> (Name, Arc<HostEndpoint>) {
        if !self.labels.is_empty() {
            self.value.labels = self.labels.into_iter().collect();
        }
        (self.name, Arc::new(self.value))
    }

    pub fn build(self) -> Update {
        let (name, value) = self.value();
        Update::HostEndpoint(name, Some(value))
    }
}

/// Reads `name/protocol/number`.
fn endpoint_port(text: &str) -> EndpointPort {
    let [name, protocol, port] = text.split('/').collect::<Vec<_>>()[..] else { panic!("port {text:?}") };
    let protocol = protocol_text(protocol).number().expect("a protocol number");
    EndpointPort { name: name.into(), protocol, port: port.parse().expect("a port number") }
}

/// Reads `key=value,key,…`.
pub fn labels(text: &str) -> Labels {
    text.split(',').filter(|label| !label.is_empty()).map(label_pair).collect()
}

/// Starts a policy from `gnp/name` or `np/namespace/name` (and the other kinds' short forms). It
/// selects everything, has no rules, applies in both directions, and is in tier `default` without an
/// order.
pub fn policy(key: &str) -> PolicyBuilder {
    policy_of(policy_key(key))
}

/// As [`policy`], for names that its text cannot say.
pub fn policy_of(key: PolicyKey) -> PolicyBuilder {
    let selector = Arc::new(Selector::all());
    let value = Policy {
        tier: "default".into(),
        order: None,
        original_selector: selector.canonical().into(),
        selector,
        ingress: true,
        egress: true,
        do_not_track: false,
        pre_dnat: false,
        apply_on_forward: false,
        always_needed: false,
        inbound: Vec::new(),
        outbound: Vec::new(),
    };
    PolicyBuilder { key, value }
}

/// Reads the text that `PolicyKey` prints.
pub fn policy_key(text: &str) -> PolicyKey {
    use PolicyKind::{
        GlobalNetworkPolicy, KubernetesClusterNetworkPolicy, KubernetesNetworkPolicy, NetworkPolicy,
        StagedGlobalNetworkPolicy, StagedKubernetesNetworkPolicy, StagedNetworkPolicy,
    };
    let kinds = [
        GlobalNetworkPolicy,
        KubernetesClusterNetworkPolicy,
        KubernetesNetworkPolicy,
        NetworkPolicy,
        StagedGlobalNetworkPolicy,
        StagedKubernetesNetworkPolicy,
        StagedNetworkPolicy,
    ];
    let (short, rest) = text.split_once('/').unwrap_or_else(|| panic!("policy key {text:?}"));
    let kind = kinds.into_iter().find(|kind| kind.short() == short).unwrap_or_else(|| panic!("policy key {text:?}"));
    let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
    PolicyKey { kind, namespace: namespace.into(), name: name.into() }
}

/// See [`policy`].
#[derive(Clone, Debug)]
pub struct PolicyBuilder {
    key: PolicyKey,
    value: Policy,
}

impl PolicyBuilder {
    #[must_use]
    pub fn selector(mut self, text: &str) -> Self {
        self.value.selector = selector(text);
        self.value.original_selector = self.value.selector.canonical().into();
        self
    }

    #[must_use]
    pub fn tier(mut self, name: &str) -> Self {
        self.value.tier = name.into();
        self
    }

    #[must_use]
    pub const fn order(mut self, order: f64) -> Self {
        self.value.order = Some(order);
        self
    }

    /// Adds an inbound rule; see [`rule`].
    #[must_use]
    pub fn ingress(mut self, text: &str) -> Self {
        self.value.inbound.push(rule(text));
        self
    }

    /// Adds an outbound rule; see [`rule`].
    #[must_use]
    pub fn egress(mut self, text: &str) -> Self {
        self.value.outbound.push(rule(text));
        self
    }

    /// Anything else.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Policy)) -> Self {
        change(&mut self.value);
        self
    }

    pub fn value(self) -> (PolicyKey, Arc<Policy>) {
        (self.key, Arc::new(self.value))
    }

    pub fn build(self) -> Update {
        let (key, value) = self.value();
        Update::Policy(key, Some(value))
    }
}

/// Parses a selector.
pub fn selector(text: &str) -> Arc<Selector> {
    Arc::new(Selector::parse(text).unwrap_or_else(|error| panic!("selector {text:?}: {error}")))
}

/// Starts a rule from its action; everything else is absent.
pub fn rule_of(action: Action) -> Rule {
    Rule::for_everything(action)
}

/// Reads a rule: an action (`allow`, `deny`, `log`, `pass`), then any of
///
/// ```text
/// v4 | v6 | protocol <name or number> | not-protocol … | tcp | udp | sctp | icmp | icmpv6
/// icmp-type <type[,code]> | not-icmp-type …
/// from <selector> | from-not <selector> | from-nets <a,b> | from-not-nets <a,b>
/// from-ports <80,8000:8080,http> | from-not-ports … | from-service <namespace/name>
/// ```
///
/// and the same with `to`. A selector ends where the next of these words begins.
pub fn rule(text: &str) -> Rule {
    let mut words = text.split_whitespace().peekable();
    let action = match words.next() {
        Some("allow") => Action::Allow,
        Some("deny") => Action::Deny,
        Some("log") => Action::Log,
        Some("pass") => Action::Pass,
        other => panic!("action {other:?} in rule {text:?}"),
    };
    let mut rule = rule_of(action);
    while let Some(word) = words.next() {
        let mut argument = || {
            let mut argument: Vec<&str> = words.next().into_iter().collect();
            while let Some(word) = words.next_if(|word| !is_keyword(word)) {
                argument.push(word);
            }
            argument.join(" ")
        };
        match word {
            "v4" => rule.family = Some(Family::V4),
            "v6" => rule.family = Some(Family::V6),
            "tcp" | "udp" | "sctp" => rule.protocol = Some(Protocol::Name(word.into())),
            "icmp" | "icmpv6" => {
                rule.family = Some(if word == "icmp" { Family::V4 } else { Family::V6 });
                rule.protocol = Some(Protocol::Name(word.into()));
            }
            "protocol" => rule.protocol = Some(protocol_text(&argument())),
            "not-protocol" => rule.not_protocol = Some(protocol_text(&argument())),
            "icmp-type" => rule.icmp = Some(icmp(&argument())),
            "not-icmp-type" => rule.not_icmp = Some(icmp(&argument())),
            _ if word.starts_with("from") => side(&mut rule.source, &word[4..], &argument()),
            _ if word.starts_with("to") => side(&mut rule.destination, &word[2..], &argument()),
            _ => panic!("word {word:?} in rule {text:?}"),
        }
    }
    rule
}

fn is_keyword(word: &str) -> bool {
    const PLAIN: &[&str] =
        &["v4", "v6", "tcp", "udp", "sctp", "icmp", "icmpv6", "protocol", "not-protocol", "icmp-type", "not-icmp-type"];
    if PLAIN.contains(&word) {
        return true;
    }
    let sides = ["", "-not", "-nets", "-not-nets", "-ports", "-not-ports", "-service"];
    let is_side = |rest: &str| sides.contains(&rest);
    word.strip_prefix("from").is_some_and(is_side) || word.strip_prefix("to").is_some_and(is_side)
}

fn side(side: &mut EntityMatch, what: &str, argument: &str) {
    let list = || argument.split(',');
    match what {
        "" => side.selector = Some(selector(argument)),
        "-not" => side.not_selector = Some(selector(argument)),
        "-nets" => side.nets = list().map(net).collect(),
        "-not-nets" => side.not_nets = list().map(net).collect(),
        "-ports" => side.ports = list().map(port).collect(),
        "-not-ports" => side.not_ports = list().map(port).collect(),
        "-service" => {
            let (namespace, name) = argument.split_once('/').expect("namespace/name");
            side.service = Some(ServiceRef { namespace: namespace.into(), name: name.into() });
        }
        _ => panic!("unknown match {what:?}"),
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap_or_else(|error| panic!("network {text:?}: {error}"))
}

fn port(text: &str) -> Port {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) => Port::Range(PortRange { first, last }),
        _ => Port::Named(text.into()),
    }
}

fn protocol_text(text: &str) -> Protocol {
    text.parse().map_or_else(|_| Protocol::Name(text.into()), Protocol::Number)
}

fn icmp(text: &str) -> IcmpMatch {
    let (kind, code) = text.split_once(',').map_or((text, None), |(kind, code)| (kind, Some(code)));
    IcmpMatch { kind: kind.parse().unwrap(), code: code.map(|code| code.parse().unwrap()) }
}

/// A network set from its key, labels as in [`labels`], and its networks.
pub fn network_set(key: &str, labels_text: &str, nets: &[&str]) -> Update {
    let profiles = key.split_once('/').map(|(namespace, _)| format!("kns.{namespace}").into());
    let value = NetworkSet {
        nets: nets.iter().map(|text| net(text)).collect(),
        labels: labels(labels_text),
        profiles: profiles.into_iter().collect(),
    };
    Update::NetworkSet(key.into(), Some(Arc::new(value)))
}

/// A tier.
pub fn tier(name: &str, order: Option<f64>, default_pass: bool) -> Update {
    Update::Tier(name.into(), Some(Tier { order, default_pass }))
}

/// The rules of a profile, as in [`rule`].
pub fn profile_rules(name: &str, inbound: &[&str], outbound: &[&str]) -> Update {
    let rules = |texts: &[&str]| texts.iter().map(|text| rule(text)).collect();
    let value = ProfileRules { inbound: rules(inbound), outbound: rules(outbound) };
    Update::ProfileRules(name.into(), Some(Arc::new(value)))
}

/// The labels of a profile, as in [`labels`].
pub fn profile_labels(name: &str, text: &str) -> Update {
    Update::ProfileLabels(name.into(), Some(Arc::new(labels(text))))
}

/// An interface of this host.
pub fn link(name: &str, index: u32, up: bool) -> Update {
    Update::Link(name.into(), Some(LinkState { index, up, generation: 0 }))
}

/// The same key, absent.
pub fn absent(update: &Update) -> Update {
    match update.clone() {
        Update::WorkloadEndpoint(key, _) => Update::WorkloadEndpoint(key, None),
        Update::Policy(key, _) => Update::Policy(key, None),
        Update::Tier(name, _) => Update::Tier(name, None),
        Update::ProfileRules(name, _) => Update::ProfileRules(name, None),
        Update::ProfileLabels(name, _) => Update::ProfileLabels(name, None),
        Update::NetworkSet(name, _) => Update::NetworkSet(name, None),
        Update::HostEndpoint(name, _) => Update::HostEndpoint(name, None),
        Update::Link(name, _) => Update::Link(name, None),
        Update::Config(source, _) => Update::Config(source, None),
        Update::Ready(_) => Update::Ready(None),
    }
}

/// Tells whether the update says that its object is absent.
pub const fn is_absent(update: &Update) -> bool {
    match update {
        Update::WorkloadEndpoint(_, value) => value.is_none(),
        Update::Policy(_, value) => value.is_none(),
        Update::Tier(_, value) => value.is_none(),
        Update::ProfileRules(_, value) => value.is_none(),
        Update::ProfileLabels(_, value) => value.is_none(),
        Update::NetworkSet(_, value) => value.is_none(),
        Update::HostEndpoint(_, value) => value.is_none(),
        Update::Link(_, value) => value.is_none(),
        Update::Config(_, value) => value.is_none(),
        Update::Ready(value) => value.is_none(),
    }
}
