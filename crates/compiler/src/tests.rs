//! Histories of batches: whatever came before, the program is that of the present state.

use std::collections::{BTreeMap, BTreeSet};

use graph::{
    MemberDelta, MemberList, PolicyProgram, PolicyRef, ProfileProgram, RuleProgram, SetContents, SetMember, SetType,
    TierProgram,
};
use model::{PolicyKey, PolicyKind, SetId, WorkloadEndpoint, WorkloadEndpointKey};
use program::{BaseChain, Hooks, Member, SetChange, SetName, SetSpec};
use proptest::prelude::*;

use super::*;

// === impl Kernel: what a perfect dataplane would have ===

#[derive(Clone, Debug, Default, PartialEq)]
struct Kernel {
    sets: BTreeMap<(Family, SetName), (SetSpec, BTreeSet<Member>)>,
    chains: BTreeMap<(TableId, ChainName), Arc<Chain>>,
    hooks: BTreeMap<(TableId, BaseChain), Hooks>,
    interfaces: BTreeMap<Name, InterfaceSpec>,
    routes: BTreeMap<(Family, Name), Vec<RouteSpec>>,
}

impl Kernel {
    /// Applies changes in the order of netfilter.md 19 and checks what must hold on the way.
    fn apply(&mut self, changes: &Changes) {
        let Changes { seq: _, links: _, sets, tables, interfaces, routes } = changes;
        for (key, change) in sets {
            match change {
                SetChange::Replace { spec, members } => {
                    assert_eq!((spec.family, &spec.name), (key.0, &key.1));
                    self.sets.insert(key.clone(), (spec.clone(), members.iter().collect()));
                }
                SetChange::Delta { added, removed } => {
                    assert!(!added.is_empty() || !removed.is_empty());
                    let (_, members) = self.sets.get_mut(key).expect("a delta is for a set that exists");
                    assert!(removed.iter().all(|member| members.contains(&member)));
                    assert!(!added.iter().any(|member| members.contains(&member)));
                    members.retain(|member| !removed.contains(member));
                    members.extend(added.iter());
                }
                SetChange::Remove => {}
            }
        }
        for (id, table) in tables {
            for (base, hooks) in &table.hooks {
                self.hooks.insert((*id, *base), hooks.clone());
            }
            for (name, chain) in &table.chains {
                let key = (*id, name.clone());
                let old = match chain {
                    Some(chain) => self.chains.insert(key, Arc::clone(chain)),
                    None => Some(self.chains.remove(&key).expect("only chains that exist are removed")),
                };
                assert_ne!(old.as_ref(), chain.as_ref(), "{name} is told without a change");
            }
        }
        self.check_references();
        for (key, _) in sets.iter().filter(|(_, change)| **change == SetChange::Remove) {
            self.sets.remove(key).expect("only sets that exist are removed");
        }
        self.check_references();
        for (name, spec) in interfaces {
            match spec {
                Some(spec) => drop(self.interfaces.insert(Name::clone(name), *spec)),
                None => drop(self.interfaces.remove(name).expect("only known interfaces go")),
            }
        }
        for (key, list) in routes {
            self.routes.insert(key.clone(), list.clone());
        }
        self.routes.retain(|_, list| !list.is_empty());
    }

    fn check_references(&self) {
        let mut reachable: BTreeSet<(TableId, ChainName)> = BTreeSet::new();
        let mut todo: Vec<(TableId, ChainName)> = Vec::new();
        for ((id, _), hooks) in &self.hooks {
            let rules = hooks.inserts.iter().chain(&hooks.appends);
            todo.extend(rules.filter_map(Rule::target).map(|target| (*id, target.clone())));
        }
        while let Some(key) = todo.pop() {
            let chain = self.chains.get(&key).unwrap_or_else(|| panic!("jump target {key:?} does not exist"));
            if reachable.insert(key.clone()) {
                todo.extend(chain.targets().map(|target| (key.0, target.clone())));
                for set in chain.rules.iter().flat_map(Rule::sets) {
                    assert!(self.sets.contains_key(&(key.0.family, set.clone())), "set {set} does not exist");
                }
            }
        }
        let present: BTreeSet<_> = self.chains.keys().cloned().collect();
        let loose: Vec<_> = present.difference(&reachable).filter(|(_, name)| !is_forced(name)).collect();
        assert!(loose.is_empty(), "nothing leads to {loose:?}");
    }
}

// === impl State: what a graph would know ===

/// The result of all updates so far.
#[derive(Clone, Debug, Default)]
struct State {
    sets: BTreeMap<SetId, SetContents>,
    policies: BTreeMap<PolicyKey, Arc<PolicyProgram>>,
    profiles: BTreeMap<Name, Arc<ProfileProgram>>,
    endpoints: BTreeMap<Name, Arc<EndpointProgram>>,
}

impl State {
    /// The batch between two states, as the graph makes it.
    fn batch_to(&self, next: &Self) -> Batch {
        let mut batch = Batch {
            policies: difference(&self.policies, &next.policies),
            profiles: difference(&self.profiles, &next.profiles),
            endpoints: difference(&self.endpoints, &next.endpoints),
            ..Batch::default()
        };
        for (id, contents) in &next.sets {
            match self.sets.get(id) {
                Some(old) if old.kind == contents.kind => {
                    let without = |a: &MemberList, b: &MemberList| -> MemberList {
                        a.iter().filter(|member| !b.contains(member)).collect()
                    };
                    let added = without(&contents.members, &old.members);
                    let removed = without(&old.members, &contents.members);
                    if !added.is_empty() || !removed.is_empty() {
                        batch.members.insert(id.clone(), MemberDelta { added, removed });
                    }
                }
                _ => {
                    batch.sets_created.insert(id.clone(), contents.clone());
                }
            }
        }
        batch.sets_removed = self.sets.keys().filter(|id| !next.sets.contains_key(*id)).cloned().collect();
        batch
    }
}

fn difference<K: Ord + Clone, V: PartialEq>(
    old: &BTreeMap<K, Arc<V>>,
    new: &BTreeMap<K, Arc<V>>,
) -> BTreeMap<K, Option<Arc<V>>> {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), None));
    let changed = new.iter().filter(|(key, value)| old.get(*key) != Some(value));
    gone.chain(changed.map(|(key, value)| (key.clone(), Some(Arc::clone(value))))).collect()
}

/// A small generator, so that a state is a function of one number and shrinks with it.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn half(&mut self) -> bool {
        self.roll(2) == 0
    }

    fn some<T: Clone>(&mut self, of: &[T]) -> Vec<T> {
        of.iter().filter(|_| self.half()).cloned().collect()
    }
}

fn set_id(number: u64) -> SetId {
    SetId::for_selector(&format!("has(x{number})"))
}

fn key(kind: PolicyKind, name: &str) -> PolicyKey {
    PolicyKey { kind, namespace: "".into(), name: name.into() }
}

fn policy_keys() -> Vec<PolicyKey> {
    use PolicyKind::{GlobalNetworkPolicy, NetworkPolicy, StagedGlobalNetworkPolicy};
    let namespaced = |name: &str| PolicyKey { namespace: "openstack".into(), ..key(NetworkPolicy, name) };
    vec![
        key(GlobalNetworkPolicy, "a"),
        key(GlobalNetworkPolicy, "b"),
        key(StagedGlobalNetworkPolicy, "staged"),
        key(GlobalNetworkPolicy, "c"),
        key(GlobalNetworkPolicy, "forced"),
        namespaced("ossg.default.6f1d8a0e-2a43-4b0e-9d3b-6c0a6a6a1c11"),
    ]
}

fn is_forced(name: &ChainName) -> bool {
    name.as_str().ends_with("gnp/forced")
}

fn rule(dice: &mut Dice, sets: &[SetId]) -> RuleProgram {
    let actions = [model::Action::Allow, model::Action::Deny, model::Action::Pass, model::Action::Log];
    let mut rule = bare_rule(actions[usize::try_from(dice.roll(4)).unwrap()]);
    rule.family = [None, None, Some(Family::V4), Some(Family::V6)][usize::try_from(dice.roll(4)).unwrap()];
    rule.source.sets = dice.some(sets);
    if dice.half() {
        rule.protocol = Some(model::Protocol::Number(6));
        rule.destination.ports = (0..dice.roll(20)).map(|port| model::PortRange::single(port as u16 + 1)).collect();
    }
    rule
}

fn bare_rule(action: model::Action) -> RuleProgram {
    RuleProgram::for_everything(action)
}

fn rules(dice: &mut Dice, sets: &[SetId]) -> Vec<RuleProgram> {
    (0..dice.roll(4)).map(|index| RuleProgram { index: index as u32, ..rule(dice, sets) }).collect()
}

fn state(seed: u64) -> State {
    if seed.is_multiple_of(8) {
        return State::default();
    }
    let mut dice = Dice(seed);
    let mut state = State::default();
    for number in 0..4 {
        if dice.half() {
            let pool: Vec<SetMember> = ["10.0.0.1/32", "10.0.1.0/24", "fd00::1/128", "fd00:1::/64"]
                .iter()
                .map(|net| SetMember::Net(net.parse().unwrap()))
                .collect();
            let members = dice.some(&pool).into_iter().collect();
            state.sets.insert(set_id(number), SetContents { kind: SetType::Net, members });
        }
    }
    let sets: Vec<_> = state.sets.keys().cloned().collect();
    for key in policy_keys() {
        if dice.roll(3) > 0 {
            let program = PolicyProgram {
                tier: "default".into(),
                inbound: rules(&mut dice, &sets),
                outbound: rules(&mut dice, &sets),
                untracked: false,
                pre_dnat: false,
                original_selector: "all()".into(),
                always_needed: key.name.as_ref() == "forced",
            };
            state.policies.insert(key, Arc::new(program));
        }
    }
    for name in ["kns.default", "ksa.default.default"] {
        if dice.roll(3) > 0 {
            let (inbound, outbound) = (rules(&mut dice, &sets), rules(&mut dice, &sets));
            state.profiles.insert(name.into(), Arc::new(ProfileProgram { inbound, outbound, missing: false }));
        }
    }
    for interface in ["cali1", "cali12", "cali13", "cali2", "tap1", "eth0", "cali bad"] {
        if dice.half() {
            let program = endpoint(&mut dice, &state, interface);
            state.endpoints.insert(interface.into(), Arc::new(program));
        }
    }
    state
}

fn endpoint(dice: &mut Dice, state: &State, interface: &str) -> EndpointProgram {
    let known: Vec<PolicyRef> = state
        .policies
        .keys()
        .map(|key| PolicyRef {
            key: key.clone(),
            original_selector: if key.name.len() > 8 { "x" } else { "all()" }.into(),
        })
        .collect();
    let tiers = ["security", "default"].map(|name| TierProgram {
        name: name.into(),
        ingress: dice.some(&known),
        egress: dice.some(&known),
        default_pass: dice.half(),
    });
    let tiers: Vec<_> = tiers.into_iter().filter(|tier| !tier.ingress.is_empty() || !tier.egress.is_empty()).collect();
    let profiles: Vec<Name> = state.profiles.keys().cloned().collect();
    let endpoint = WorkloadEndpoint {
        active: dice.roll(5) > 0,
        interface: interface.into(),
        mac: Some([2, 0, 0, 0, 0, 1]),
        profiles: dice.some(&profiles),
        v4_nets: dice.some(&["10.65.0.1/32".parse().unwrap(), "10.65.0.2/32".parse().unwrap()]),
        v6_nets: dice.some(&["fd00::1/128".parse().unwrap()]),
        allowed_spoofed: dice.some(&["10.9.0.0/16".parse().unwrap(), "fd09::/16".parse().unwrap()]),
        ..WorkloadEndpoint::default()
    };
    EndpointProgram { key: endpoint_key(interface), endpoint: Arc::new(endpoint), tiers: tiers.into() }
}

fn endpoint_key(name: &str) -> WorkloadEndpointKey {
    WorkloadEndpointKey {
        host: "host".into(),
        orchestrator: "openstack".into(),
        workload: format!("openstack/{name}").into(),
        endpoint: "eth0".into(),
    }
}

fn options(ipv6: bool, flow_logs: bool) -> Options {
    let interface_prefixes = vec!["cali".to_owned(), "tap".to_owned()];
    Options { ipv6, flow_logs, interface_prefixes, openstack: true, ..Options::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn after_any_history_the_program_is_that_of_the_present_state(
        seeds in proptest::collection::vec(any::<u64>(), 1..8),
        ipv6: bool,
        flow_logs: bool,
    ) {
        let options = options(ipv6, flow_logs);
        let (mut compiler, mut twin) = (Compiler::new(options.clone()), Compiler::new(options.clone()));
        let (mut kernel, mut present) = (Kernel::default(), State::default());
        for seed in seeds {
            let next = state(seed);
            let batch = present.batch_to(&next);
            let output = compiler.compile(&batch);
            prop_assert_eq!(&output, &twin.compile(&batch), "two runs differ");
            kernel.apply(&output.0);
            present = next;
        }
        let mut fresh = Kernel::default();
        let (changes, _) = Compiler::new(options.clone()).compile(&State::default().batch_to(&present));
        prop_assert!(ipv6 || mentions_no_ipv6(&changes));
        fresh.apply(&changes);
        prop_assert_eq!(&kernel, &fresh);
        // Nothing changes, nothing is told.
        let (changes, complaints) = compiler.compile(&Batch::default());
        prop_assert!(changes.is_empty() && complaints.is_empty());
        // Everything goes, nothing is remembered.
        kernel.apply(&compiler.compile(&present.batch_to(&State::default())).0);
        let mut empty = Kernel::default();
        let mut fresh = Compiler::new(options);
        empty.apply(&fresh.compile(&Batch::default()).0);
        prop_assert_eq!(&kernel, &empty);
        prop_assert!(compiler.sources.is_empty() && compiler.endpoints.is_empty());
        prop_assert!(compiler.lists.is_empty() && compiler.spoofing.is_empty());
        let remembered = |compiler: &Compiler| compiler.tables.values().map(TableProgram::remembered).collect::<Vec<_>>();
        prop_assert_eq!(remembered(&compiler), remembered(&fresh));
    }
}

fn mentions_no_ipv6(changes: &Changes) -> bool {
    changes.tables.keys().all(|id| id.family == Family::V4)
        && changes.sets.keys().all(|(family, _)| *family == Family::V4)
        && changes.routes.keys().all(|(family, _)| *family == Family::V4)
}

// === deltas, one by one ===

const FILTER_V4: TableId = TableId { family: Family::V4, table: Table::Filter };

/// A compiler that has told its static program.
fn started() -> Compiler {
    let mut compiler = Compiler::new(options(false, false));
    compiler.compile(&Batch::default());
    compiler
}

fn policy(rules: Vec<RuleProgram>) -> Option<Arc<PolicyProgram>> {
    Some(Arc::new(PolicyProgram {
        tier: "default".into(),
        inbound: rules,
        outbound: Vec::new(),
        untracked: false,
        pre_dnat: false,
        original_selector: "all()".into(),
        always_needed: false,
    }))
}

fn with_policies(interface: &str, names: &[&str]) -> Option<Arc<EndpointProgram>> {
    let ingress: Vec<_> =
        names.iter().map(|name| PolicyRef { key: global(name), original_selector: "all()".into() }).collect();
    let tier = TierProgram { name: "default".into(), ingress, egress: Vec::new(), default_pass: false };
    let endpoint = WorkloadEndpoint { active: true, interface: interface.into(), ..WorkloadEndpoint::default() };
    let endpoint = Arc::new(endpoint);
    Some(Arc::new(EndpointProgram { key: endpoint_key(interface), endpoint, tiers: Arc::new([tier]) }))
}

fn global(name: &str) -> PolicyKey {
    key(PolicyKind::GlobalNetworkPolicy, name)
}

/// Changed (`+`) and removed (`-`) chains of the IPv4 filter table.
fn told(changes: &Changes) -> Vec<String> {
    let chains = changes.tables.get(&FILTER_V4).map(|table| &table.chains);
    let chains = chains.into_iter().flatten();
    chains.map(|(name, chain)| format!("{}{name}", if chain.is_some() { '+' } else { '-' })).collect()
}

#[test]
fn a_changed_rule_changes_one_chain() {
    let mut compiler = started();
    let mut batch = Batch::default();
    batch.policies.insert(global("a"), policy(Vec::new()));
    batch.endpoints.insert("cali1".into(), with_policies("cali1", &["a"]));
    let (changes, _) = compiler.compile(&batch);
    assert_eq!(
        told(&changes),
        ["+cali-from-wl-dispatch", "+cali-fw-cali1", "+cali-pi-gnp/a", "+cali-to-wl-dispatch", "+cali-tw-cali1"]
    );
    let mut batch = Batch::default();
    batch.policies.insert(global("a"), policy(vec![bare_rule(model::Action::Allow)]));
    let (changes, _) = compiler.compile(&batch);
    assert_eq!(told(&changes), ["+cali-pi-gnp/a"]);
    assert_eq!(changes.tables.len(), 1);
    assert!(compiler.compile(&batch).0.is_empty());
}

#[test]
fn a_policy_chain_goes_with_the_last_endpoint_that_uses_it() {
    let mut compiler = started();
    let mut batch = Batch::default();
    batch.policies.insert(global("a"), policy(Vec::new()));
    compiler.compile(&batch);
    let mut batch = Batch::default();
    for interface in ["cali1", "cali2"] {
        batch.endpoints.insert(interface.into(), with_policies(interface, &["a"]));
    }
    assert!(told(&compiler.compile(&batch).0).contains(&"+cali-pi-gnp/a".to_owned()));
    let removal = |interface: &str| Batch { endpoints: BTreeMap::from([(interface.into(), None)]), ..Batch::default() };
    assert!(!told(&compiler.compile(&removal("cali1")).0).contains(&"-cali-pi-gnp/a".to_owned()));
    let (changes, _) = compiler.compile(&removal("cali2"));
    assert_eq!(
        told(&changes),
        ["+cali-from-wl-dispatch", "-cali-fw-cali2", "-cali-pi-gnp/a", "+cali-to-wl-dispatch", "-cali-tw-cali2"]
    );
    assert_eq!(changes.interfaces, BTreeMap::from([("cali2".into(), None)]));
    assert_eq!(changes.routes, BTreeMap::from([((Family::V4, "cali2".into()), Vec::new())]));
}

#[test]
fn a_group_chain_is_shared_and_goes_with_its_last_user() {
    let mut compiler = started();
    let mut batch = Batch::default();
    for name in ["a", "b", "c"] {
        batch.policies.insert(global(name), policy(Vec::new()));
    }
    batch.endpoints.insert("cali1".into(), with_policies("cali1", &["a", "b"]));
    let group = "cali-gi-js-B7zioflPRrAki3OCu";
    let told_now = told(&compiler.compile(&batch).0);
    assert!(told_now.contains(&format!("+{group}")) && told_now.contains(&"+cali-pi-gnp/b".to_owned()), "{told_now:?}");
    // A second user changes nothing about it.
    let second = |names: &[&str]| Batch {
        endpoints: BTreeMap::from([("cali2".into(), with_policies("cali2", names))]),
        ..Batch::default()
    };
    let told_now = told(&compiler.compile(&second(&["a", "b"])).0);
    assert!(!told_now.iter().any(|chain| chain.contains("cali-gi")), "{told_now:?}");
    let told_now = told(&compiler.compile(&second(&["a", "c"])).0);
    assert_eq!(told_now.len(), 3, "{told_now:?}");
    let first = Batch { endpoints: BTreeMap::from([("cali1".into(), None)]), ..Batch::default() };
    let told_now = told(&compiler.compile(&first).0);
    assert!(told_now.contains(&format!("-{group}")) && told_now.contains(&"-cali-pi-gnp/b".to_owned()), "{told_now:?}");
    assert!(!told_now.contains(&"-cali-pi-gnp/a".to_owned()), "{told_now:?}");
}

#[test]
fn a_policy_that_is_not_known_is_closed_until_it_comes() {
    let mut compiler = started();
    let mut batch = Batch::default();
    batch.endpoints.insert("cali1".into(), with_policies("cali1", &["a"]));
    let (changes, complaints) = compiler.compile(&batch);
    let chain =
        |changes: &Changes| changes.tables[&FILTER_V4].chains[&ChainName::fixed("cali-pi-gnp/a")].clone().unwrap();
    let actions: Vec<_> = chain(&changes).rules.iter().map(|rule| (rule.matches.len(), rule.action.clone())).collect();
    assert_eq!(actions, [(0, Some(Action::Drop))]);
    assert_eq!(complaints.len(), 1);
    assert_eq!(complaints[0].object, "gnp/a");
    let mut batch = Batch::default();
    batch.policies.insert(global("a"), policy(vec![bare_rule(model::Action::Allow)]));
    let (changes, complaints) = compiler.compile(&batch);
    assert_eq!((told(&changes), complaints), (vec!["+cali-pi-gnp/a".to_owned()], Vec::new()));
    // And closed again when it goes while it is still listed.
    let gone = Batch { policies: BTreeMap::from([(global("a"), None)]), ..Batch::default() };
    let (changes, complaints) = compiler.compile(&gone);
    assert_eq!(chain(&changes).rules[0].action, Some(Action::Drop));
    assert_eq!(complaints.len(), 1);
}

#[test]
fn interfaces_with_odd_names_get_nothing_and_a_complaint() {
    let odd = [
        "cali123456789012",
        "cali 1",
        "cali+",
        "cali\"",
        "cali\n",
        "cali/1",
        "cali/../x",
        "caliä",
        "eth0",
        "",
        "cali;1",
    ];
    for name in odd {
        let mut compiler = started();
        let batch = Batch {
            policies: BTreeMap::from([(global("a"), policy(Vec::new()))]),
            endpoints: BTreeMap::from([(name.into(), with_policies(name, &["a"]))]),
            ..Batch::default()
        };
        let (changes, complaints) = compiler.compile(&batch);
        assert!(changes.is_empty(), "{name}: {changes:?}");
        assert_eq!(complaints.len(), 1, "{name}");
        assert!(complaints[0].reason.contains("interface name"), "{name}: {complaints:?}");
        let gone = Batch { endpoints: BTreeMap::from([(name.into(), None)]), ..Batch::default() };
        assert!(compiler.compile(&gone).0.is_empty(), "{name}");
    }
}

/// U17.b: both keys are named, once; each of the two has its route wanted, so that the loser's is there to be written
/// when the winner leaves.
#[test]
fn endpoints_that_claim_one_address_are_named_in_both_families() {
    let mut compiler = Compiler::new(options(true, false));
    let claim = |interface: &str| {
        let mut program = EndpointProgram::clone(&with_policies(interface, &[]).unwrap());
        program.endpoint = Arc::new(WorkloadEndpoint {
            v4_nets: vec!["10.65.0.2/32".parse().unwrap()],
            v6_nets: vec!["fd10::2/128".parse().unwrap()],
            ..WorkloadEndpoint::clone(&program.endpoint)
        });
        (Name::from(interface), Some(Arc::new(program)))
    };
    let batch = |endpoints: Vec<_>| Batch { endpoints: endpoints.into_iter().collect(), ..Batch::default() };
    assert_eq!(compiler.compile(&batch(vec![claim("tap1")])).1, Vec::new());
    let (changes, complaints) = compiler.compile(&batch(vec![claim("tap2")]));
    assert_eq!(changes.routes.values().map(Vec::len).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(compiler.contested_destinations(), 2);
    let objects: Vec<&str> = complaints.iter().map(|complaint| complaint.object.as_str()).collect();
    assert_eq!(objects, ["destination 10.65.0.2/32", "destination fd10::2/128"]);
    let keys = [endpoint_key("tap1"), endpoint_key("tap2")].map(|key| key.to_string());
    for Complaint { reason, .. } in complaints {
        assert!(keys.iter().all(|key| reason.contains(key)), "{reason}");
    }
    let (changes, complaints) = compiler.compile(&batch(vec![("tap2".into(), None)]));
    assert_eq!((changes.routes.len(), complaints, compiler.contested_destinations()), (2, Vec::new(), 0));
}

#[test]
fn sets_exist_in_both_families_and_members_go_to_their_own() {
    let mut compiler = Compiler::new(options(true, false));
    compiler.compile(&Batch::default());
    let net = |text: &str| SetMember::Net(text.parse().unwrap());
    let id = set_id(1);
    let contents = SetContents { kind: SetType::Net, members: [net("10.0.0.1/32"), net("fd00::1/128")].into() };
    let create = Batch { sets_created: BTreeMap::from([(id.clone(), contents.clone())]), ..Batch::default() };
    let (changes, _) = compiler.compile(&create);
    let members: Vec<_> = changes
        .sets
        .values()
        .map(|change| match change {
            SetChange::Replace { spec, members } => {
                assert!(members.iter().all(|member| member.family() == spec.family));
                (spec.name.as_str().to_owned(), members.len(), spec.max_members)
            }
            SetChange::Delta { .. } | SetChange::Remove => panic!("{change:?}"),
        })
        .collect();
    assert_eq!(
        members,
        [4, 6].map(|digit| (id.kernel_name(if digit == 4 { Family::V4 } else { Family::V6 }), 1, 1_048_576))
    );
    let delta = MemberDelta { added: [net("10.0.0.2/32")].into(), removed: MemberList::default() };
    let (changes, _) = compiler.compile(&Batch { members: BTreeMap::from([(id.clone(), delta)]), ..Batch::default() });
    assert_eq!(changes.sets.keys().map(|(family, _)| *family).collect::<Vec<_>>(), [Family::V4]);
    // Removed and made again in one batch.
    let again = Batch { sets_removed: BTreeSet::from([id.clone()]), ..create.clone() };
    let (changes, _) = compiler.compile(&again);
    assert!(changes.sets.values().all(|change| matches!(change, SetChange::Replace { .. })));
    let (changes, _) = compiler.compile(&Batch { sets_removed: BTreeSet::from([id]), ..Batch::default() });
    assert_eq!(changes.sets.values().collect::<Vec<_>>(), [&SetChange::Remove, &SetChange::Remove]);
}

#[test]
fn members_that_the_kernel_refuses_are_left_out() {
    let mut compiler = Compiler::new(options(true, false));
    compiler.compile(&Batch::default());
    let port = |text: &str| SetMember::AddressPort { address: text.parse().unwrap(), protocol: 6, port: 80 };
    let members = ["0.0.0.0", "10.0.0.1", "::", "fd00::1"].map(port).into();
    let id = set_id(1);
    let contents = SetContents { kind: SetType::AddressPort, members };
    let create = Batch { sets_created: BTreeMap::from([(id.clone(), contents)]), ..Batch::default() };
    let (changes, _) = compiler.compile(&create);
    let n_members = |change: &SetChange| match change {
        SetChange::Replace { members, .. } => members.len(),
        SetChange::Delta { .. } | SetChange::Remove => panic!("{change:?}"),
    };
    assert_eq!(changes.sets.values().map(n_members).collect::<Vec<_>>(), [1, 1]);
    let delta = MemberDelta { added: MemberList::default(), removed: ["0.0.0.0", "::"].map(port).into() };
    let (changes, _) = compiler.compile(&Batch { members: BTreeMap::from([(id, delta)]), ..Batch::default() });
    assert!(changes.sets.is_empty(), "{:?}", changes.sets);
}

#[test]
fn a_rule_with_a_set_that_does_not_exist_is_closed() {
    let mut compiler = started();
    let with_set = |action| {
        let mut rule = bare_rule(action);
        rule.source.sets = vec![set_id(9)];
        rule
    };
    // It was there, and is not any more.
    let mut batch = Batch::default();
    let contents = SetContents { kind: SetType::Net, members: Default::default() };
    batch.sets_created.insert(set_id(9), contents);
    compiler.compile(&batch);
    compiler.compile(&Batch { sets_removed: [set_id(9)].into(), ..Batch::default() });

    let mut batch = Batch::default();
    batch.policies.insert(global("a"), policy(vec![with_set(model::Action::Allow), with_set(model::Action::Deny)]));
    batch.endpoints.insert("cali1".into(), with_policies("cali1", &["a"]));
    let (changes, complaints) = compiler.compile(&batch);
    let chain = changes.tables[&FILTER_V4].chains[&ChainName::fixed("cali-pi-gnp/a")].clone().unwrap();
    assert!(chain.rules.iter().all(|rule| rule.sets().next().is_none()));
    let actions: Vec<_> = chain.rules.iter().map(|rule| rule.action.clone()).collect();
    assert_eq!(actions, [Some(Action::SetMark(0x40000)), Some(Action::Drop)]);
    assert_eq!(complaints.len(), 2, "{complaints:?}");
}

#[test]
fn routes_are_those_of_active_endpoints_and_openstack_floating_addresses() {
    let mut compiler = Compiler::new(options(true, false));
    let mac = Some([2, 0, 0, 0, 0, 1]);
    let mut endpoint = WorkloadEndpoint {
        active: true,
        interface: "tap1".into(),
        mac,
        v4_nets: vec!["10.65.0.7/32".parse().unwrap()],
        v6_nets: vec!["fd10::2/128".parse().unwrap()],
        nats: vec![("10.65.0.7".parse().unwrap(), "192.0.2.10".parse().unwrap())],
        ..WorkloadEndpoint::default()
    };
    let mut compile = |endpoint: &WorkloadEndpoint, orchestrator: &str| {
        let key = WorkloadEndpointKey { orchestrator: orchestrator.into(), ..endpoint_key("tap1") };
        let program = EndpointProgram { key, endpoint: Arc::new(endpoint.clone()), tiers: Arc::new([]) };
        let endpoints = BTreeMap::from([("tap1".into(), Some(Arc::new(program)))]);
        let (changes, _) = compiler.compile(&Batch { endpoints, ..Batch::default() });
        changes
            .routes
            .into_values()
            .map(|routes| routes.iter().map(|r| (r.destination.to_string(), r.metric, r.mac)).collect())
            .collect::<Vec<Vec<_>>>()
    };
    let route = |net: &str| (net.to_owned(), 1024, mac);
    assert_eq!(
        compile(&endpoint, "openstack"),
        [vec![route("10.65.0.7/32"), route("192.0.2.10/32")], vec![route("fd10::2/128")]]
    );
    assert_eq!(compile(&endpoint, "k8s"), [vec![route("10.65.0.7/32")]], "only what changed");
    endpoint.active = false;
    assert_eq!(compile(&endpoint, "k8s"), [Vec::new(), Vec::new()]);
}

#[test]
fn rules_carry_their_origin() {
    let mut compiler = started();
    let mut batch = Batch::default();
    let rule = RuleProgram { index: 3, ..bare_rule(model::Action::Allow) };
    batch.policies.insert(global("a"), policy(vec![rule]));
    batch.endpoints.insert("cali1".into(), with_policies("cali1", &["a"]));
    let (changes, _) = compiler.compile(&batch);
    let chain = changes.tables[&FILTER_V4].chains[&ChainName::fixed("cali-pi-gnp/a")].clone().unwrap();
    let direction = program::Direction::Ingress;
    assert_eq!(chain.rules[0].origin, Some(program::Origin::Policy { key: global("a"), direction, index: 3 }));
}
