//! Text of rules and chains against `vectors/rule_rendering.json`, byte for byte (netfilter.md 3 to 12, 15).
//!
//! Each section has a function that checks its cases and returns the ids of those it checked; the last test holds
//! these ids against the file and [`LATER`], so that no case is forgotten.

#![allow(clippy::unwrap_used, reason = "helper functions of tests fail the test that uses them")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use compiler::dispatch::{self, HostDispatch};
use compiler::endpoint::{self, EndpointChain, Group, Groups, Kind, Limits};
use compiler::endpoint_marks::EndpointMarks;
use compiler::options::{AllowAction, DenyAction, EndpointToHost};
use compiler::policy::{self, Context, Owner};
use compiler::{Compiler, Marks, Options, names, static_chains};
use dataplane::iptables::features::Features;
use dataplane::iptables::hash::{APPENDS_SUFFIX, rule_hashes};
use dataplane::iptables::render::{rule_fragment, rule_line};
use felix_tests::rule_text::{RuleCase, lines, policy_key, rule_program, section, text, texts, vectors};
use graph::{Batch, EndpointProgram, PolicyRef, TierProgram};
use model::{Family, Name, PolicyKey, PolicyKind, QosControls, SetId, WorkloadEndpoint, WorkloadEndpointKey};
use program::{Action, BaseChain, Chain, ChainName, Direction, Rule, SetName, Table, TableId};
use serde_json::Value;

/// Cases that no test here covers: section, id (`*` stands for anything before it), why.
const LATER: &[(&str, &str, &str)] = &[
    ("static_chains", "*/mangle", "the mangle table is not compiled yet"),
    ("static_chains", "*/nat", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "masq", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "masq-v6", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "masq-portrange", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "snat-address", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "snat-address-portrange", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "interface-filter", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "exclude-host-ips", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "old-iptables", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "inactive", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "fip-dnat", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "fip-snat", "the nat table is not compiled yet"),
    ("nat_and_misc_chains", "cidr-block", "service addresses are not read yet"),
    ("nat_and_misc_chains", "egress-dscp", "the mangle table is not compiled yet"),
];

/// Sections of the file that are no cases of rendering, and where they are used.
const OTHER_SECTIONS: &[(&str, &str)] = &[
    ("about", "prose"),
    ("format", "prose"),
    ("defaults", "the defaults of `Options`, `Marks` and `Features`"),
    ("reference_defects", "prose; the required text is in the other sections"),
    ("chain_names_older_releases", "names of older releases are recognised by prefix only"),
    ("table_sync", "tests of the table driver"),
];

const INTERFACE: &str = "cali1234abcd567";

type Ids = BTreeSet<String>;

fn each(vectors: &Value, name: &str, mut check: impl FnMut(usize, &Value) -> String) -> Ids {
    section(vectors, name).iter().enumerate().map(|(index, case)| check(index, case)).collect()
}

fn by_family(case: &Value) -> [(Family, &Value); 2] {
    [(Family::V4, &case["ipv4"]), (Family::V6, &case["ipv6"])]
}

fn expected_chains(case: &Value) -> BTreeMap<String, Vec<String>> {
    serde_json::from_value(case["chains"].clone()).unwrap()
}

fn rendered(chains: impl IntoIterator<Item = Chain>, features: &Features) -> BTreeMap<String, Vec<String>> {
    chains.into_iter().map(|chain| (chain.name.to_string(), lines(&chain, features))).collect()
}

fn rule_cases(vectors: &Value) -> Ids {
    each(vectors, "rule_cases", |_, case| {
        let rule_case = RuleCase::read(case);
        let id = rule_case.id;
        for (family, expected) in by_family(case) {
            let mut complaints = Vec::new();
            let context = rule_case.context(family);
            let rules = policy::rule(&context, &rule_case.rule, &mut complaints);
            assert!(complaints.is_empty(), "{id} {family}: {complaints:?}");
            let wanted = expected["rules"].as_array().unwrap();
            assert_eq!(rules.len(), wanted.len(), "{id} {family}: {rules:?}");
            for (rule, wanted) in rules.iter().zip(wanted) {
                assert_eq!(rule.comments, texts(&wanted["comment"]), "{id} {family}");
                assert!(rule.origin.is_some(), "{id} {family}: no origin");
                let bare = Rule { comments: Vec::new(), ..rule.clone() };
                let words = [text(wanted, "match"), text(wanted, "action")];
                let wanted = words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ");
                assert_eq!(rule_fragment(&bare, &rule_case.features), wanted, "{id} {family}");
            }
            let chain = policy::chain(&context, std::slice::from_ref(&rule_case.rule), &mut complaints);
            assert_eq!(chain.name.as_str(), text(expected, "chain"), "{id} {family}");
            if !expected["chain_lines"].is_null() {
                assert_eq!(lines(&chain, &rule_case.features), texts(&expected["chain_lines"]), "{id} {family}");
            }
        }
        id.to_owned()
    })
}

fn policy_chains(vectors: &Value) -> Ids {
    each(vectors, "policy_chains", |_, case| {
        let id = text(case, "id");
        let key = case.get("policy").map(policy_key);
        let profile: Option<Name> = case.get("profile").and_then(Value::as_str).map(Name::from);
        for (family, expected) in by_family(case) {
            let expected: BTreeMap<String, Vec<String>> = serde_json::from_value(expected.clone()).unwrap();
            // What the compiler is never asked for has no chains.
            let staged = key.as_ref().is_some_and(|key| key.kind.is_staged());
            let directions = [(Direction::Ingress, "inbound"), (Direction::Egress, "outbound")];
            let chains = directions.iter().filter(|_| !staged).map(|(direction, field)| {
                let rules: Vec<_> = section(case, field).iter().map(rule_program).collect();
                let owner = match (&key, &profile) {
                    (Some(key), _) => Owner::Policy { key, tier: text(case, "tier"), untracked: false },
                    (None, Some(name)) => Owner::Profile { name },
                    (None, None) => panic!("{id}: neither policy nor profile"),
                };
                let set_name = &|id: &SetId, family| SetName::new(&id.kernel_name(family));
                let options = &Options::default();
                let (direction, table) = (*direction, Table::Filter);
                let context = Context { options, owner, direction, family, table, set_name };
                let mut complaints = Vec::new();
                let chain = policy::chain(&context, &rules, &mut complaints);
                assert!(complaints.is_empty(), "{id}: {complaints:?}");
                chain
            });
            assert_eq!(rendered(chains, &Features::default()), expected, "{id} {family}");
        }
        id.to_owned()
    })
}

fn chain_names(vectors: &Value) -> Ids {
    each(vectors, "chain_names", |index, case| {
        let (prefix, suffix) = (text(case, "prefix"), text(case, "suffix"));
        let max = case["max_length"].as_u64().unwrap().try_into().unwrap();
        assert_eq!(names::limited_id(prefix, suffix, max), text(case, "name"));
        if max == ChainName::MAX {
            assert_eq!(names::chain(prefix, suffix).as_str(), text(case, "name"));
        }
        index.to_string()
    })
}

fn ipset_names(vectors: &Value) -> Ids {
    each(vectors, "ipset_names", |index, case| {
        let family = if case["ip_version"] == 4 { Family::V4 } else { Family::V6 };
        let id = text(case, "set_id");
        assert_eq!(names::fixed_set(id, family).as_str(), text(case, "name"));
        assert_eq!(SetId::from_text(id).kernel_name(family), text(case, "name"));
        index.to_string()
    })
}

fn policy_groups(vectors: &Value) -> Ids {
    each(vectors, "policy_groups", |index, case| {
        let direction = match text(case, "direction") {
            "inbound" => Direction::Ingress,
            _ => Direction::Egress,
        };
        let keys: Vec<PolicyKey> = section(case, "policies").iter().map(policy_key).collect();
        let name = names::group_chain(text(case, "selector"), direction, keys.iter());
        assert_eq!(name.as_str(), text(case, "chain"));
        assert_eq!(case["inlined"], false, "an inlined group has no chain to compare");
        let policies = keys.iter().filter(|key| !key.kind.is_staged()).cloned().collect();
        let chain = endpoint::group_chain(&Options::default(), name, &Group { direction, policies });
        assert_eq!(lines(&chain, &Features::default()), texts(&case["chain_lines"]));
        index.to_string()
    })
}

fn nflog_prefixes(vectors: &Value) -> Ids {
    each(vectors, "nflog_prefixes", |index, case| {
        assert_eq!(names::flow_log_prefix(text(case, "raw")), text(case, "prefix"));
        index.to_string()
    })
}

fn endpoint_marks(vectors: &Value) -> Ids {
    let case = &vectors["endpoint_marks"];
    let hex = |value: &str| u32::from_str_radix(value.strip_prefix("0x").unwrap(), 16).unwrap();
    let options =
        Marks { endpoint: hex(text(case, "mask")), non_cali: hex(text(case, "non_cali")), ..Marks::default() };
    let mut marks = EndpointMarks::new(&options);
    for entry in section(case, "marks") {
        assert_eq!(marks.allocate(&text(entry, "interface").into()), Some(hex(text(entry, "mark"))), "{entry}");
    }
    case.as_object().unwrap().keys().cloned().collect()
}

/// Reads the few rules of the hash vectors back from their text.
fn rule_of_hash_text(chain: &str, line: &str) -> Rule {
    let rest = line.strip_prefix(&format!("-A {chain} HASH")).unwrap();
    let (comment, rest) = match rest.strip_prefix(" -m comment --comment \"") {
        Some(rest) => rest.split_once('"').map(|(comment, rest)| (Some(comment), rest)).unwrap(),
        None => (None, rest),
    };
    let accept = Options::default().marks.accept;
    let (matches, rest) = match rest.strip_prefix(" -m mark --mark 0x10000/0x10000") {
        Some(rest) => (vec![program::Match::MarkIs { value: accept, mask: accept }], rest),
        None => (Vec::new(), rest),
    };
    let action = match rest.strip_prefix(" --jump ").unwrap() {
        "DROP" => Action::Drop,
        "ACCEPT" => Action::Accept,
        "MARK --set-mark 0x10000/0x10000" => Action::SetMark(accept),
        chain => Action::Jump(ChainName::new(chain).unwrap()),
    };
    Rule { comments: comment.map(str::to_owned).into_iter().collect(), ..Rule::new(matches, action) }
}

fn rule_hash_cases(vectors: &Value) -> Ids {
    each(vectors, "rule_hashes", |index, case| {
        let chain = text(case, "chain");
        let rules: Vec<Rule> =
            section(case, "rules").iter().map(|rule| rule_of_hash_text(chain, text(rule, "text"))).collect();
        let features = Features::default();
        for (rule, wanted) in rules.iter().zip(section(case, "rules")) {
            let line = format!("-A {chain} HASH {}", rule_fragment(rule, &features));
            assert_eq!(line, text(wanted, "text"));
        }
        let hashes = rule_hashes(chain, &rules, &features);
        assert_eq!(hashes.iter().map(|hash| hash.as_str()).collect::<Vec<_>>(), texts(&case["hashes"]));
        index.to_string()
    })
}

fn global(name: &str) -> PolicyRef {
    policy_ref(PolicyKind::GlobalNetworkPolicy, name)
}

fn policy_ref(kind: PolicyKind, name: &str) -> PolicyRef {
    let key = PolicyKey { kind, namespace: "".into(), name: name.into() };
    PolicyRef { key, original_selector: "all()".into() }
}

fn tier(name: &str, ingress: &[PolicyRef], egress: &[PolicyRef]) -> TierProgram {
    TierProgram { name: name.into(), ingress: ingress.to_vec(), egress: egress.to_vec(), default_pass: false }
}

fn default_tier() -> TierProgram {
    tier("default", &[global("a")], &[global("a")])
}

fn workload(tiers: Vec<TierProgram>, profiles: &[&str]) -> EndpointProgram {
    let key = WorkloadEndpointKey {
        host: "host".into(),
        orchestrator: "k8s".into(),
        workload: "default/pod".into(),
        endpoint: "eth0".into(),
    };
    let endpoint = WorkloadEndpoint {
        active: true,
        interface: INTERFACE.into(),
        profiles: profiles.iter().map(|profile| Name::from(*profile)).collect(),
        ..WorkloadEndpoint::default()
    };
    EndpointProgram { key, endpoint: Arc::new(endpoint), tiers: tiers.into() }
}

/// The chains of a workload case, from its note and netfilter.md 8 and 9.
fn workload_case(id: &str) -> Vec<Chain> {
    let mut options = Options::default();
    let mut mark = None;
    let kns = ["kns.default"];
    let program = match id {
        "wep-one-policy" => workload(vec![default_tier()], &kns),
        "wep-two-tiers-group" => {
            let security = TierProgram { default_pass: true, ..tier("security", &[global("s1"), global("s2")], &[]) };
            workload(vec![security, default_tier()], &kns)
        }
        "wep-profiles-only" => workload(Vec::new(), &["kns.default", "ksa.default.default"]),
        "wep-no-profiles" => workload(Vec::new(), &[]),
        "wep-admin-down" => {
            let program = workload(vec![default_tier()], &kns);
            let endpoint = WorkloadEndpoint { active: false, ..program.endpoint.as_ref().clone() };
            EndpointProgram { endpoint: Arc::new(endpoint), ..program }
        }
        "wep-staged-only" => {
            let staged = [policy_ref(PolicyKind::StagedGlobalNetworkPolicy, "st")];
            workload(vec![tier("default", &staged, &[])], &kns)
        }
        "wep-qos" => {
            let program = workload(Vec::new(), &kns);
            let qos = QosControls {
                ingress_packet_rate: 1000,
                ingress_packet_burst: 5,
                egress_packet_rate: 2000,
                egress_packet_burst: 5,
                ingress_max_connections: 10,
                egress_max_connections: 20,
            };
            let endpoint = WorkloadEndpoint { qos: Some(Box::new(qos)), ..program.endpoint.as_ref().clone() };
            EndpointProgram { endpoint: Arc::new(endpoint), ..program }
        }
        "wep-encap-allowed" => {
            options.allow_vxlan_from_workloads = true;
            options.allow_ipip_from_workloads = true;
            workload(Vec::new(), &kns)
        }
        "wep-return-reject" => {
            options.filter_allow = AllowAction::Return;
            options.filter_deny = DenyAction::Reject;
            workload(vec![default_tier()], &kns)
        }
        "wep-flowlogs" => {
            options.flow_logs = true;
            workload(vec![default_tier()], &kns)
        }
        "wep-ipvs" => {
            options.ipvs = true;
            mark = EndpointMarks::new(&options.marks).allocate(&INTERFACE.into());
            workload(Vec::new(), &[])
        }
        "wep-no-invalid" => {
            options.check_invalid = false;
            workload(Vec::new(), &[])
        }
        other => panic!("no input for {other}"),
    };
    endpoint::workload_chains(&options, INTERFACE, &program, mark, &mut Groups::new())
}

/// The chains of a host endpoint case, by the rows of netfilter.md 8.1.
fn host_case(id: &str) -> Vec<Chain> {
    let tiers = [default_tier()];
    let profiles = [Name::from("p1")];
    let no_forward = matches!(id, "hep-filter-no-forward" | "hep-filter-wildcard");
    let interface = if id == "hep-filter-wildcard" { names::ANY_INTERFACE } else { "eth0" };
    let (table, rows): (_, &[(&str, Kind)]) = match id {
        "hep-filter" | "hep-filter-no-forward" | "hep-filter-wildcard" => (
            Table::Filter,
            &[
                (names::TO_HOST, Kind::Normal),
                (names::FROM_HOST, Kind::Normal),
                (names::TO_HOST_FW, Kind::Forward),
                (names::FROM_HOST_FW, Kind::Forward),
            ],
        ),
        "hep-mangle-egress" => (Table::Mangle, &[(names::TO_HOST, Kind::Normal)]),
        "hep-mangle-ingress" => (Table::Mangle, &[(names::FROM_HOST, Kind::PreDnat)]),
        "hep-raw" => (Table::Raw, &[(names::TO_HOST, Kind::Untracked), (names::FROM_HOST, Kind::Untracked)]),
        other => panic!("no input for {other}"),
    };
    let chain = |(prefix, kind): &(&'static str, Kind)| {
        let egress = matches!(*prefix, names::TO_HOST | names::TO_HOST_FW);
        let failsafe = if egress { names::FAILSAFE_OUT } else { names::FAILSAFE_IN };
        let returns = table == Table::Mangle && *kind == Kind::Normal;
        let chain = EndpointChain {
            name: names::chain(prefix, interface),
            table,
            kind: *kind,
            direction: if egress { Direction::Egress } else { Direction::Ingress },
            tiers: if no_forward && *kind == Kind::Forward { &[] } else { &tiers },
            profiles: if no_forward { &[] } else { &profiles },
            failsafe: (*kind != Kind::Forward).then_some(failsafe),
            established: if returns { AllowAction::Return } else { AllowAction::Accept },
            block_tunnels: false,
            limits: Limits::default(),
        };
        endpoint::endpoint_chain(&Options::default(), &chain, &mut Groups::new())
    };
    rows.iter().map(chain).collect()
}

fn endpoint_chains(vectors: &Value) -> Ids {
    each(vectors, "endpoint_chains", |_, case| {
        let id = text(case, "id");
        let chains = if id.starts_with("wep-") { workload_case(id) } else { host_case(id) };
        assert_eq!(rendered(chains, &Features::default()), expected_chains(case), "{id}");
        id.to_owned()
    })
}

fn dispatch_chains(vectors: &Value) -> Ids {
    use HostDispatch::{From, FromForward, To, ToForward};
    each(vectors, "dispatch_chains", |_, case| {
        let id = text(case, "id");
        let options = Options::default();
        let all = texts(&case["input"]);
        let wildcard = all.contains(&"*");
        let names: Vec<&str> = all.iter().copied().filter(|name| *name != "*").collect();
        let hosts = |table, which: &[HostDispatch]| -> Vec<Chain> {
            which.iter().flat_map(|which| dispatch::hosts(&options, table, *which, &names, wildcard)).collect()
        };
        let chains = match id {
            "host-none-filter" | "host-two-filter" | "host-wildcard-filter" => {
                hosts(Table::Filter, &[From, To, FromForward, ToForward])
            }
            "host-wildcard-mangle-to" => hosts(Table::Mangle, &[To]),
            "host-wildcard-mangle-from" => hosts(Table::Mangle, &[From]),
            "host-raw" => hosts(Table::Raw, &[From, To]),
            "ipvs-marks" => {
                let mut marks = EndpointMarks::new(&options.marks);
                for name in &names {
                    marks.allocate(&Name::from(*name));
                }
                let (workloads, hosts): (Vec<&str>, Vec<&str>) =
                    names.iter().partition(|name| name.starts_with("cali"));
                dispatch::endpoint_marks(&options, &workloads, &hosts, &|name| marks.get(name))
            }
            _ if id.starts_with("wl-") => dispatch::workloads(&options, &names),
            other => panic!("no input for {other}"),
        };
        assert_eq!(rendered(chains, &Features::default()), expected_chains(case), "{id}");
        id.to_owned()
    })
}

/// Options and features of a configuration of the static chains.
fn static_options(overrides: &Value) -> (Options, Features) {
    let mut options = Options::default();
    let mut features = Features::default();
    // The vectors' WireGuard chain, which nothing refers to unless WireGuard is on, always has the bit.
    options.marks.wireguard = 0x20_0000;
    let hex = |value: &Value| u32::from_str_radix(value.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap();
    for (name, value) in overrides.as_object().unwrap() {
        match name.as_str() {
            "prefixes" => options.interface_prefixes = serde_json::from_value(value.clone()).unwrap(),
            "openstack" => options.openstack = value.as_bool().unwrap(),
            "md_ip" => options.metadata_address = Some(value.as_str().unwrap().parse().unwrap()),
            "md_port" => options.metadata_port = value.as_u64().unwrap().try_into().unwrap(),
            "ipip" => options.ipip_enabled = value.as_bool().unwrap(),
            "vxlan" => options.vxlan_enabled_v4 = value.as_bool().unwrap(),
            "vxlan6" => options.vxlan_enabled_v6 = value.as_bool().unwrap(),
            "wg" => options.wireguard_port_v4 = Some(51820),
            "wg6" => options.wireguard_port_v6 = Some(51821),
            "wg_encrypt_host" => options.wireguard_encrypt_host = value.as_bool().unwrap(),
            "mark_ep" => options.marks.endpoint = hex(value),
            "mark_noncali" => options.marks.non_cali = hex(value),
            "ipvs" => options.ipvs = value.as_bool().unwrap(),
            "deny" => options.filter_deny = DenyAction::Reject,
            "filter_allow" => options.filter_allow = AllowAction::Return,
            "mangle_allow" => options.mangle_allow = AllowAction::Return,
            "ep_to_host" => options.endpoint_to_host = EndpointToHost::Return,
            "f_snat" => features.snat_random_fully = value.as_bool().unwrap(),
            "f_masq" => features.masquerade_random_fully = value.as_bool().unwrap(),
            "f_nflogsize" => features.nflog_size = value.as_bool().unwrap(),
            "ipip_tun" | "vxlan_tun" | "vxlan_tun6" => {} // nat only
            other => panic!("option {other} is not known"),
        }
    }
    (options, features)
}

fn hook_lines(op: char, base: BaseChain, suffix: &str, rules: &[Rule], features: &Features) -> Vec<String> {
    let hashes = rule_hashes(&format!("{}{suffix}", base.as_str()), rules, features);
    let op = format!("-{op} {}", base.as_str());
    rules.iter().zip(hashes).map(|(rule, hash)| rule_line(&op, rule, hash, features)).collect()
}

fn static_tables(vectors: &Value) -> Ids {
    let mut checked = Ids::new();
    for case in section(vectors, "static_chains") {
        let (options, features) = static_options(&case["overrides"]);
        let family = if case["ip_version"] == 4 { Family::V4 } else { Family::V6 };
        for table in [Table::Raw, Table::Filter] {
            let id = format!("{}-v{}/{}", text(case, "config"), family.digit(), table.as_str());
            let wanted = &case["tables"][table.as_str()];
            let chains = if table == Table::Raw {
                static_chains::raw(&options, family)
            } else {
                static_chains::filter(&options, family)
            };
            assert_eq!(rendered(chains, &features), expected_chains(wanted), "{id}");
            let (mut inserts, mut appends) = (BTreeMap::new(), BTreeMap::new());
            for (base, hooks) in static_chains::hooks(&options, table) {
                let name = base.as_str().to_owned();
                if !hooks.inserts.is_empty() {
                    inserts.insert(name.clone(), hook_lines('I', base, "", &hooks.inserts, &features));
                }
                if !hooks.appends.is_empty() {
                    appends.insert(name, hook_lines('A', base, APPENDS_SUFFIX, &hooks.appends, &features));
                }
            }
            let lists = |field: &str| -> BTreeMap<String, Vec<String>> {
                serde_json::from_value(wanted[field].clone()).unwrap()
            };
            assert_eq!((inserts, appends), (lists("base_inserts"), lists("base_appends")), "{id}");
            checked.insert(id);
        }
    }
    checked
}

fn misc_chains(vectors: &Value) -> Ids {
    let case = section(vectors, "nat_and_misc_chains").iter().find(|case| text(case, "id") == "rpf-skip").unwrap();
    let mut batch = Batch::default();
    for entry in section(case, "input") {
        let [interface, net] = texts(entry).try_into().unwrap();
        let program = workload(Vec::new(), &[]);
        let mut endpoint = program.endpoint.as_ref().clone();
        endpoint.allowed_spoofed = vec![net.parse().unwrap()];
        let program = EndpointProgram { endpoint: Arc::new(endpoint), ..program };
        batch.endpoints.insert(interface.into(), Some(Arc::new(program)));
    }
    let (changes, complaints) = Compiler::new(Options::default()).compile(&batch);
    assert!(complaints.is_empty(), "{complaints:?}");
    let raw = &changes.tables[&TableId { family: Family::V4, table: Table::Raw }];
    let chain = raw.chains[&ChainName::fixed(names::RPF_SKIP)].as_ref().unwrap();
    assert_eq!(lines(chain, &Features::default()), texts(&case["lines"]));
    Ids::from(["rpf-skip".to_owned()])
}

type Check = fn(&Value) -> Ids;

const CHECKS: &[(&str, Check)] = &[
    ("rule_cases", rule_cases),
    ("policy_chains", policy_chains),
    ("chain_names", chain_names),
    ("ipset_names", ipset_names),
    ("policy_groups", policy_groups),
    ("nflog_prefixes", nflog_prefixes),
    ("endpoint_marks", endpoint_marks),
    ("rule_hashes", rule_hash_cases),
    ("static_chains", static_tables),
    ("endpoint_chains", endpoint_chains),
    ("dispatch_chains", dispatch_chains),
    ("nat_and_misc_chains", misc_chains),
];

/// The ids of all cases of a section, as the checks report them.
fn ids_in_file(vectors: &Value, name: &str) -> Ids {
    match name {
        "endpoint_marks" => vectors[name].as_object().unwrap().keys().cloned().collect(),
        "static_chains" => {
            let tables = |case: &Value| {
                let prefix = format!("{}-v{}", text(case, "config"), case["ip_version"]);
                let tables = case["tables"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
                tables.into_iter().map(move |table| format!("{prefix}/{table}"))
            };
            section(vectors, name).iter().flat_map(tables).collect()
        }
        _ => each(vectors, name, |index, case| match case["id"].as_str() {
            Some(id) => id.to_owned(),
            None => index.to_string(),
        }),
    }
}

#[test]
fn policy_and_profile_rules_have_the_text_of_the_vectors() {
    assert_eq!(rule_cases(&vectors()).len(), 76);
    assert_eq!(policy_chains(&vectors()).len(), 8);
}

#[test]
fn names_are_those_of_the_vectors() {
    let vectors = vectors();
    for check in [chain_names, ipset_names, policy_groups, nflog_prefixes, endpoint_marks] {
        assert!(!check(&vectors).is_empty());
    }
}

#[test]
fn rule_hashes_are_those_of_the_vectors() {
    assert_eq!(rule_hash_cases(&vectors()).len(), 10);
}

#[test]
fn endpoint_and_dispatch_chains_have_the_text_of_the_vectors() {
    let vectors = vectors();
    assert_eq!(endpoint_chains(&vectors).len(), 18);
    assert_eq!(dispatch_chains(&vectors).len(), 11);
    assert_eq!(misc_chains(&vectors).len(), 1);
}

#[test]
fn static_chains_have_the_text_of_the_vectors() {
    assert_eq!(static_tables(&vectors()).len(), 26);
}

#[test]
fn every_case_of_the_file_is_tested_or_listed_for_later() {
    let vectors = vectors();
    let known = CHECKS.iter().map(|(name, _)| *name).chain(OTHER_SECTIONS.iter().map(|(name, _)| *name));
    assert_eq!(known.collect::<BTreeSet<_>>(), vectors.as_object().unwrap().keys().map(String::as_str).collect());
    let mut used = BTreeSet::new();
    for (name, check) in CHECKS {
        let tested = check(&vectors);
        let all = ids_in_file(&vectors, name);
        assert!(tested.is_subset(&all), "{name}: {:?}", tested.difference(&all));
        for id in &all {
            let entries: Vec<_> =
                LATER.iter().filter(|(section, later, _)| section == name && stands_for(later, id)).collect();
            match (tested.contains(id), entries.as_slice()) {
                (true, []) => {}
                (false, [entry]) => {
                    used.insert(*entry);
                }
                (true, _) => panic!("{name} {id} is tested; take it off the list"),
                (false, _) => panic!("{name} {id} is neither tested nor listed once for later"),
            }
        }
    }
    let stale: Vec<_> = LATER.iter().filter(|entry| !used.contains(entry)).collect();
    assert!(stale.is_empty(), "entries without a case: {stale:?}");
}

fn stands_for(pattern: &str, id: &str) -> bool {
    pattern.strip_prefix('*').map_or(pattern == id, |suffix| id.ends_with(suffix))
}
