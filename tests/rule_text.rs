//! Reads `vectors/rule_rendering.json` (netfilter.md 23) into the types of the program, and renders chains as lines.
//!
//! Shared by the tests that compare text and those that load it into a kernel.

use compiler::Options;
use compiler::options::DenyAction;
use compiler::policy::{Context, Owner};
use dataplane::iptables::features::Features;
use dataplane::iptables::hash::rule_hashes;
use dataplane::iptables::render::rule_line;
use graph::{RuleProgram, SideProgram};
use model::{Action, Family, IcmpMatch, Name, PolicyKey, PolicyKind, PortRange, Protocol, SetId};
use program::{Chain, Direction, Rate, RateUnit, SetName, Table};
use serde_json::Value;

/// Returns the parsed vector file.
///
/// # Panics
///
/// If it cannot be read.
#[must_use]
pub fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/rule_rendering.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns the cases of a section.
///
/// # Panics
///
/// If there is no such section.
#[must_use]
pub fn section<'a>(vectors: &'a Value, name: &str) -> &'a [Value] {
    vectors[name].as_array().unwrap_or_else(|| panic!("no section {name}"))
}

/// Returns the text of a field.
///
/// # Panics
///
/// If the field is not text.
#[must_use]
pub fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} is not text in {value}"))
}

/// Returns a list of texts.
///
/// # Panics
///
/// If it is none.
#[must_use]
pub fn texts(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect()
}

/// Returns the lines that append a chain's rules.
#[must_use]
pub fn lines(chain: &Chain, features: &Features) -> Vec<String> {
    let hashes = rule_hashes(chain.name.as_str(), &chain.rules, features);
    let op = format!("-A {}", chain.name);
    chain.rules.iter().zip(hashes).map(|(rule, hash)| rule_line(&op, rule, hash, features)).collect()
}

/// Returns the rule of a vector.
///
/// # Panics
///
/// If it has a field that is not known here.
#[must_use]
pub fn rule_program(rule: &Value) -> RuleProgram {
    let mut program = RuleProgram::for_everything(Action::Allow);
    for (field, value) in rule.as_object().unwrap() {
        if let Some((side, negated, field)) = side_field(field) {
            let side = if side == "src" { &mut program.source } else { &mut program.destination };
            set_side_field(side, negated, field, value);
            continue;
        }
        match field.as_str() {
            "action" => program.action = action(value.as_str().unwrap()),
            "ip_version" => program.family = Some(family(value)),
            "protocol" => program.protocol = Some(protocol(value)),
            "not_protocol" => program.not_protocol = Some(protocol(value)),
            "icmp_type" | "icmp_type_code" => program.icmp = Some(icmp(value)),
            "not_icmp_type" | "not_icmp_type_code" => program.not_icmp = Some(icmp(value)),
            "metadata" => program.annotations = serde_json::from_value(value["annotations"].clone()).unwrap(),
            other => panic!("rule field {other} is not known"),
        }
    }
    program
}

/// `not_src_net` and the like: side, negated, rest of the name.
fn side_field(field: &str) -> Option<(&str, bool, &str)> {
    let (negated, field) = field.strip_prefix("not_").map_or((false, field), |rest| (true, rest));
    let (side, rest) = field.split_once('_')?;
    matches!(side, "src" | "dst").then_some((side, negated, rest))
}

fn set_side_field(side: &mut SideProgram, negated: bool, field: &str, value: &Value) {
    let items = value.as_array().unwrap();
    let sets = || items.iter().map(|id| SetId::from_text(id.as_str().unwrap())).collect();
    let nets = || items.iter().map(|net| net.as_str().unwrap().parse().unwrap()).collect();
    let ports =
        || items.iter().map(|range| PortRange { first: port(&range["first"]), last: port(&range["last"]) }).collect();
    match (field, negated) {
        ("net", false) => side.nets = nets(),
        ("net", true) => side.not_nets = nets(),
        ("ports", false) => side.ports = ports(),
        ("ports", true) => side.not_ports = ports(),
        ("ip_set_ids", false) => side.sets = sets(),
        ("ip_set_ids", true) => side.not_sets = sets(),
        ("named_port_ip_set_ids", false) => side.named_port_sets = sets(),
        ("named_port_ip_set_ids", true) => side.not_named_port_sets = sets(),
        ("ip_port_set_ids", false) => side.address_port_sets = sets(),
        other => panic!("rule field {other:?} is not known"),
    }
}

fn action(word: &str) -> Action {
    match word {
        "" | "allow" => Action::Allow,
        "deny" => Action::Deny,
        "pass" | "next-tier" => Action::Pass,
        "log" => Action::Log,
        other => panic!("action {other} is not known"),
    }
}

fn family(value: &Value) -> Family {
    match value.as_u64() {
        Some(4) => Family::V4,
        Some(6) => Family::V6,
        other => panic!("IP version {other:?}"),
    }
}

fn port(value: &Value) -> u16 {
    value.as_u64().unwrap().try_into().unwrap()
}

fn byte(value: &Value) -> u8 {
    value.as_u64().unwrap().try_into().unwrap()
}

fn protocol(value: &Value) -> Protocol {
    match value["name"].as_str() {
        Some(name) => Protocol::Name(name.into()),
        None => Protocol::Number(byte(&value["number"])),
    }
}

fn icmp(value: &Value) -> IcmpMatch {
    if value.is_object() {
        IcmpMatch { kind: byte(&value["type"]), code: Some(byte(&value["code"])) }
    } else {
        IcmpMatch { kind: byte(value), code: None }
    }
}

/// Returns the policy of a vector.
///
/// # Panics
///
/// If its kind is not known.
#[must_use]
pub fn policy_key(value: &Value) -> PolicyKey {
    let kinds = [
        PolicyKind::GlobalNetworkPolicy,
        PolicyKind::KubernetesClusterNetworkPolicy,
        PolicyKind::KubernetesNetworkPolicy,
        PolicyKind::NetworkPolicy,
        PolicyKind::StagedGlobalNetworkPolicy,
        PolicyKind::StagedKubernetesNetworkPolicy,
        PolicyKind::StagedNetworkPolicy,
    ];
    let kind = kinds.into_iter().find(|kind| kind.as_str() == text(value, "kind")).unwrap();
    PolicyKey { kind, namespace: text(value, "namespace").into(), name: text(value, "name").into() }
}

/// Returns options and features of a rule case.
///
/// # Panics
///
/// If it overrides something that is not known here.
#[must_use]
pub fn case_options(overrides: &Value) -> (Options, Features) {
    let mut options = Options { log_burst: 0, ..Options::default() };
    let mut features = Features::default();
    for (name, value) in overrides.as_object().unwrap() {
        match name.as_str() {
            "iptables_filter_deny_action" => {
                assert_eq!(value, "REJECT");
                options.filter_deny = DenyAction::Reject;
            }
            "log_rate_limit" => {
                assert_eq!(value, "5/minute");
                options.log_rate = Some(Rate { count: 5, per: RateUnit::Minute });
            }
            "log_rate_limit_burst" => options.log_burst = value.as_u64().unwrap().try_into().unwrap(),
            "log_prefix" => options.log_prefix = value.as_str().unwrap().to_owned(),
            "flow_logs_enabled" => options.flow_logs = value.as_bool().unwrap(),
            "features.nflog_size" => features.nflog_size = value.as_bool().unwrap(),
            other => panic!("option {other} is not known"),
        }
    }
    (options, features)
}

/// A rule case, ready to render.
#[derive(Debug)]
pub struct RuleCase<'a> {
    pub id: &'a str,
    pub options: Options,
    pub features: Features,
    pub rule: RuleProgram,
    direction: Direction,
    owner: CaseOwner,
}

#[derive(Debug)]
enum CaseOwner {
    Policy { key: PolicyKey, tier: Name, untracked: bool },
    Profile(Name),
}

impl<'a> RuleCase<'a> {
    /// Reads a case of section `rule_cases`.
    ///
    /// # Panics
    ///
    /// If it does not have the shape of netfilter.md 23.
    #[must_use]
    pub fn read(case: &'a Value) -> Self {
        let (options, features) = case_options(&case["config_overrides"]);
        let context = &case["context"];
        let mut rule = rule_program(&case["rule"]);
        rule.index = context["rule_index"].as_u64().unwrap().try_into().unwrap();
        let direction = match text(context, "direction") {
            "ingress" => Direction::Ingress,
            "egress" => Direction::Egress,
            other => panic!("direction {other}"),
        };
        let owner = match text(context, "owner") {
            "policy" => CaseOwner::Policy {
                key: policy_key(&context["policy"]),
                tier: text(context, "tier").into(),
                untracked: context["untracked"].as_bool().unwrap(),
            },
            "profile" => CaseOwner::Profile(text(context, "profile").into()),
            other => panic!("owner {other}"),
        };
        Self { id: text(case, "id"), options, features, rule, direction, owner }
    }

    /// Returns what the compiler is asked with, in the filter table.
    #[must_use]
    pub fn context(&self, family: Family) -> Context<'_> {
        let owner = match &self.owner {
            CaseOwner::Policy { key, tier, untracked } => Owner::Policy { key, tier, untracked: *untracked },
            CaseOwner::Profile(name) => Owner::Profile { name },
        };
        let set_name = &|id: &SetId, family| SetName::new(&id.kernel_name(family));
        let Self { options, direction, .. } = self;
        Context { options, owner, direction: *direction, family, table: Table::Filter, set_name }
    }
}
