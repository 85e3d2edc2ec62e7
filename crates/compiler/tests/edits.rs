//! What small changes touch where much is in force: exactly the chains that must differ, however many
//! policies and endpoints there are (policy.md A-7, netfilter.md 8.3).

use std::collections::BTreeSet;

use compiler::{Compiler, Options, Work, names};
use graph::{Batch, Graph};
use model::{Family, PolicyKey, Update};
use program::{Changes, Direction, Table};
use testkit::build::{absent, rule};
use testkit::workload::edits::{Edits, is_in_group, policy_key};
use testkit::workload::{self, one_rule_edit};

struct Host {
    graph: Graph,
    compiler: Compiler,
}

impl Host {
    fn start(edits: Edits) -> Self {
        let mut host = Self { graph: Graph::new(workload::HOST.into()), compiler: Compiler::new(Options::default()) };
        edits.start().for_each(|update| host.graph.apply(update));
        let batch = host.graph.take_batch();
        assert_eq!(batch.policies.len(), edits.policies as usize);
        assert_eq!(batch.endpoints.len(), edits.endpoints as usize);
        let (_, complaints) = host.compiler.compile(&batch);
        assert_eq!(complaints, []);
        host
    }

    /// The batch of one update, what it changes, and the work that took.
    fn apply(&mut self, update: Update) -> (Batch, Changes, Work) {
        let before = self.compiler.work();
        self.graph.apply(update);
        let batch = self.graph.take_batch();
        let (changes, complaints) = self.compiler.compile(&batch);
        assert_eq!(complaints, []);
        let after = self.compiler.work();
        let work = Work {
            chains_rendered: after.chains_rendered - before.chains_rendered,
            chains_told: after.chains_told - before.chains_told,
        };
        (batch, changes, work)
    }
}

/// The chains that changes touch, as `4 name` or `-4 name`.
fn touched(changes: &Changes) -> BTreeSet<String> {
    let mut touched = BTreeSet::new();
    for (id, table) in &changes.tables {
        assert_eq!(id.table, Table::Filter);
        assert!(table.hooks.is_empty());
        for (name, chain) in &table.chains {
            let sign = if chain.is_some() { "" } else { "-" };
            touched.insert(format!("{sign}{} {name}", id.family.digit()));
        }
    }
    touched
}

/// One chain in both families.
fn both(sign: &str, chain: impl std::fmt::Display) -> [String; 2] {
    Family::BOTH.map(|family| format!("{sign}{} {chain}", family.digit()))
}

fn inbound_chain(key: &PolicyKey) -> [String; 2] {
    both("", names::policy_chain(key, Direction::Ingress))
}

/// Sizes that differ by an order of magnitude, in both ways.
const SIZES: [(u32, u32); 4] = [(60, 10), (60, 200), (600, 10), (600, 200)];

#[test]
fn a_change_of_one_rule_touches_the_chains_of_its_policy_at_any_size() {
    let mut seen = BTreeSet::new();
    let mut works = Vec::new();
    for (policies, endpoints) in SIZES {
        let edits = one_rule_edit(policies, endpoints);
        let mut host = Host::start(edits);
        for n in 0..40 {
            let (key, update) = edits.edit(n);
            let (batch, changes, work) = host.apply(update);
            assert!(batch.endpoints.is_empty() && batch.sets_created.is_empty() && batch.members.is_empty());
            assert_eq!(batch.policies.keys().collect::<Vec<_>>(), [&key]);
            assert_eq!(touched(&changes), inbound_chain(&key).into());
            assert!(changes.sets.is_empty() && changes.routes.is_empty() && changes.interfaces.is_empty());
            works.push(work);
            seen.insert(key.name.contains("-a-"));
        }
    }
    // Policies inside a policy group and others.
    assert_eq!(seen.len(), 2);
    // Both directions of it were looked at in both families.
    works.dedup();
    assert_eq!(works, [Work { chains_rendered: 4, chains_told: 2 }]);
}

#[test]
fn a_policy_whose_set_changes_touches_its_chains_and_the_set() {
    for (policies, endpoints) in SIZES {
        let edits = one_rule_edit(policies, endpoints);
        let mut host = Host::start(edits);
        for p in [0, 10] {
            let key = policy_key(p);
            let with_set = |selector: &str| {
                let update = edits.start().find(|update| matches!(update, Update::Policy(of, _) if *of == key));
                let Some(Update::Policy(_, Some(value))) = update else { panic!("no policy {key}") };
                let mut value = value.as_ref().clone();
                value.inbound[4] = rule(&format!("allow from {selector}"));
                Update::Policy(key.clone(), Some(value.into()))
            };
            for (selector, sets) in [("has(new)", 1), ("has(newer)", 2), ("has(marker-0)", 1)] {
                let (batch, changes, work) = host.apply(with_set(selector));
                assert!(batch.endpoints.is_empty());
                assert_eq!(batch.sets_created.len() + batch.sets_removed.len(), sets, "{selector}");
                assert_eq!(changes.sets.len(), 2 * sets, "{selector}");
                assert_eq!(touched(&changes), inbound_chain(&key).into(), "{selector}");
                assert_eq!(work, Work { chains_rendered: 4, chains_told: 2 });
            }
        }
    }
}

#[test]
fn an_endpoint_touches_its_own_chains_and_the_dispatch_on_its_path() {
    let mut works = BTreeSet::new();
    for (policies, endpoints) in SIZES {
        let edits = one_rule_edit(policies, endpoints);
        let mut host = Host::start(edits);
        let another = edits.another_endpoint();
        let interface = Edits::interface(endpoints);
        let own = ["cali-tw-", "cali-fw-"].map(|prefix| format!("{prefix}{interface}"));
        let bin = &interface[4..5];
        let child = ["from", "to"].map(|way| format!("cali-{way}-wl-dispatch-{bin}"));
        for (update, sign) in [(another.clone(), ""), (absent(&another), "-")] {
            let (batch, changes, work) = host.apply(update);
            assert_eq!((batch.endpoints.len(), batch.policies.len()), (1, 0));
            let mut touched = touched(&changes);
            for chain in &own {
                for expected in both(sign, chain) {
                    assert!(touched.remove(&expected), "{expected}: {touched:?}");
                }
            }
            // With many endpoints there are others that begin alike; with few, the root may find it itself.
            let path: BTreeSet<String> = ["from", "to"]
                .iter()
                .flat_map(|way| both("", format!("cali-{way}-wl-dispatch")))
                .chain(child.iter().flat_map(|child| both("", child)))
                .chain(child.iter().flat_map(|child| both("-", child)))
                .collect();
            assert!(touched.is_subset(&path), "{touched:?}");
            if endpoints == 200 {
                assert_eq!(touched, child.iter().flat_map(|child| both("", child)).collect());
                works.insert((sign, work.chains_rendered, work.chains_told));
            }
        }
    }
    // Own chains and child of both directions, and the root, which is looked at.
    assert_eq!(works, BTreeSet::from([("", 6, 8), ("-", 4, 8)]));
}

#[test]
fn other_policies_for_one_endpoint_touch_its_own_chains() {
    for (policies, endpoints) in SIZES.into_iter().filter(|(_, endpoints)| *endpoints == 200) {
        let edits = one_rule_edit(policies, endpoints);
        let mut host = Host::start(edits);
        let interface = Edits::interface(0);
        for n in 1..=4 {
            let (batch, changes, work) = host.apply(edits.moved_endpoint(n));
            assert_eq!((batch.endpoints.len(), batch.policies.len()), (1, 0));
            let own = ["cali-tw-", "cali-fw-"].map(|prefix| both("", format!("{prefix}{interface}")));
            assert_eq!(touched(&changes), own.into_iter().flatten().collect());
            assert_eq!(work, Work { chains_rendered: 2, chains_told: 4 });
        }
    }
}

#[test]
fn the_workload_has_policies_inside_and_outside_of_groups() {
    let (inside, outside): (Vec<u32>, Vec<u32>) = (0..60).partition(|p| is_in_group(*p));
    assert_eq!((inside.len(), outside.len()), (30, 30));
    let edits = one_rule_edit(60, 10);
    let mut graph = Graph::new(workload::HOST.into());
    edits.start().for_each(|update| graph.apply(update));
    let (changes, _) = Compiler::new(Options::default()).compile(&graph.take_batch());
    let filter = changes.tables.iter().find(|(id, _)| id.table == Table::Filter).map(|(_, table)| table).unwrap();
    let groups = filter.chains.keys().filter(|name| name.as_str().starts_with("cali-gi-")).count();
    assert_eq!(groups, 10);
}
