//! Tests of the stage against a plain model of what it should know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::selector::LabelSource;
use proptest::prelude::*;
use proptest::sample::select;
use testkit::build::{self, labels};

use super::*;

/// A stage with what it needs, and a plain model of what it should know.
#[derive(Default)]
struct Bench {
    names: Names,
    inherited: ProfileLabels,
    stage: Selectors,
    /// What the deltas add up to: (selector, class).
    matches: BTreeSet<(u32, u32)>,
    objects: BTreeMap<u8, (Labels, Vec<Name>, u32)>,
    selectors: BTreeMap<u8, (Arc<Selector>, u32)>,
    profiles: BTreeMap<Name, Labels>,
}

impl Bench {
    fn set_object(&mut self, id: u8, value: Option<(&str, &str)>) {
        let mut out = Vec::new();
        let new = value.map(|(own, profiles)| {
            let own = labels(own);
            let profiles: Vec<Name> = profiles.split(',').filter(|name| !name.is_empty()).map(Name::from).collect();
            let class = self.stage.join(&mut self.names, &self.inherited, &own, &profiles, &mut out);
            (own, profiles, class)
        });
        let old = match new {
            Some(new) => self.objects.insert(id, new),
            None => self.objects.remove(&id),
        };
        if let Some((_, _, class)) = old {
            self.stage.leave(&mut self.names, &self.inherited, class, &mut out);
        }
        self.follow(out);
    }

    fn set_selector(&mut self, id: u8, text: Option<&str>) {
        let mut out = Vec::new();
        let new = text.map(|text| {
            let selector = build::selector(text);
            let (number, _) = self.stage.register(&mut self.names, &self.inherited, &selector, &mut out);
            (selector, number)
        });
        let old = match new {
            Some(new) => self.selectors.insert(id, new),
            None => self.selectors.remove(&id),
        };
        if let Some((_, number)) = old {
            self.stage.unregister(&mut self.names, number, &mut out);
        }
        self.follow(out);
    }

    fn set_profile(&mut self, name: &str, value: Option<&str>) {
        let mut out = Vec::new();
        let name = Name::from(name);
        let value = value.map(labels);
        if let Some(change) = self.inherited.set(&mut self.names, &name, value.as_ref()) {
            self.stage.change_profile(&self.names, &self.inherited, &change, &mut out);
            self.inherited.settle(&mut self.names, change);
        }
        let is_started = |delta: &MatchDelta| matches!(delta, MatchDelta::Started { .. });
        assert!(out.is_sorted_by_key(|delta| !is_started(delta)), "all Started come first");
        match value {
            Some(value) => drop(self.profiles.insert(name, value)),
            None => drop(self.profiles.remove(&name)),
        }
        self.follow(out);
    }

    fn follow(&mut self, out: Vec<MatchDelta>) {
        for delta in out {
            match delta {
                MatchDelta::Started { selector, class } => assert!(self.matches.insert((selector, class))),
                MatchDelta::Stopped { selector, class } => assert!(self.matches.remove(&(selector, class))),
            }
        }
    }

    fn evals(&self) -> u64 {
        let stats = self.stage.stats();
        stats.evals_true + stats.evals_false
    }

    /// Compares with a join by nested loops.
    fn check(&self) {
        let mut expected = BTreeSet::new();
        for (own, profiles, class) in self.objects.values() {
            let source = Plain { own, profiles, inherited: &self.profiles };
            for (selector, number) in self.selectors.values() {
                if selector.matches(&source) {
                    expected.insert((*number, *class));
                }
            }
        }
        assert_eq!(self.matches, expected);
        for (_, number) in self.selectors.values() {
            let mut classes = Vec::new();
            self.stage.matching(*number, &mut classes);
            let expected: Vec<u32> =
                expected.iter().filter(|(selector, _)| selector == number).map(|(_, class)| *class).collect();
            assert_eq!(classes, expected);
        }
        for (_, _, class) in self.objects.values() {
            let expected: Vec<u32> =
                expected.iter().filter(|(_, of)| of == class).map(|(selector, _)| *selector).collect();
            assert_eq!(self.stage.matches_of(*class).collect::<Vec<_>>(), expected);
        }
    }
}

struct Plain<'a> {
    own: &'a Labels,
    profiles: &'a [Name],
    inherited: &'a BTreeMap<Name, Labels>,
}

impl LabelSource for Plain<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        let inherited = || self.profiles.iter().find_map(|profile| self.inherited.get(profile)?.get(name));
        self.own.get(name).or_else(inherited).map(AsRef::as_ref)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Object(u8, Option<(&'static str, &'static str)>),
    Selector(u8, Option<&'static str>),
    Profile(&'static str, Option<&'static str>),
}

fn any_step() -> impl Strategy<Value = Step> {
    let own = select(vec!["", "a=1", "a=2,b=1", "b=2", "b=1,c=", "c=1"]);
    let profiles = select(vec!["", "p", "q", "p,q", "q,p", "p,p", "r,q"]);
    let selectors = select(vec![
        "all()",
        "a in {}",
        "has(a)",
        "!has(a)",
        "a == '1'",
        "a != '1'",
        "a in {'1', '2'}",
        "b in {'1', '3'} && has(a)",
        "has(a) && has(b) && has(c)",
        "a == '1' || b == '2'",
        "has(c) && !has(b)",
        "nowhere == '1'",
        "a starts with '2' && b != '1'",
    ]);
    prop_oneof![
        (0..5u8, prop::option::weighted(0.8, (own.clone(), profiles))).prop_map(|(id, value)| Step::Object(id, value)),
        (0..5u8, prop::option::weighted(0.8, selectors)).prop_map(|(id, value)| Step::Selector(id, value)),
        (select(vec!["p", "q"]), prop::option::weighted(0.8, own)).prop_map(|(id, value)| Step::Profile(id, value)),
    ]
}

proptest! {
    #[test]
    fn deltas_add_up_to_the_join_of_selectors_and_objects(steps in prop::collection::vec(any_step(), 0..40)) {
        let mut bench = Bench::default();
        for step in &steps {
            match *step {
                Step::Object(id, value) => bench.set_object(id, value),
                Step::Selector(id, text) => bench.set_selector(id, text),
                Step::Profile(name, value) => bench.set_profile(name, value),
            }
            bench.check();
        }
        for id in 0..5 {
            bench.set_object(id, None);
            bench.set_selector(id, None);
        }
        bench.set_profile("p", None);
        bench.set_profile("q", None);
        prop_assert!(bench.stage.is_empty() && bench.inherited.is_empty() && bench.names.is_empty());
        prop_assert!(bench.matches.is_empty());
    }
}

/// Inheritance (the table of B-7) as selectors see it.
#[test]
fn own_labels_come_first_and_then_the_profiles_in_order() {
    let cases = [
        ("role == 'web'", true, true),
        ("color == 'blue'", true, true),
        ("zone == '1'", true, false),
        ("zone == '2'", false, true),
        ("tier == 'gold'", true, true),
        ("size == 'big'", true, true),
        ("has(env)", false, false),
    ];
    let mut bench = Bench::default();
    bench.set_profile("P", Some("color=red,zone=1,size=big"));
    bench.set_profile("Q", Some("zone=2,tier=gold"));
    bench.set_object(0, Some(("role=web,color=blue", "P,Q")));
    bench.set_object(1, Some(("role=web,color=blue", "Q,P")));
    for (text, first, second) in cases {
        bench.set_selector(0, Some(text));
        let number = bench.selectors[&0].1;
        let classes = [bench.objects[&0].2, bench.objects[&1].2];
        assert_eq!(classes.map(|class| bench.matches.contains(&(number, class))), [first, second], "{text}");
        bench.check();
    }
    bench.set_profile("P", None);
    for (text, expected) in [("zone == '2'", true), ("has(size)", false)] {
        bench.set_selector(0, Some(text));
        assert_eq!(bench.matches.len(), if expected { 2 } else { 0 }, "{text}, without P");
    }
}

/// G3: what an object costs does not depend on how many selectors share a common label with it, whether
/// the selectors or the objects come first.
#[test]
fn an_object_costs_the_selectors_that_its_rarest_labels_lead_to() {
    for objects_first in [false, true] {
        let mut costs = Vec::new();
        for n in [10, 1_000] {
            let mut bench = Bench::default();
            if objects_first {
                for id in 0..100 {
                    bench.set_object(id, Some((&format!("alpha=beta,unique-{id}=x"), "p")));
                }
            }
            for i in 0..n {
                let selector = build::selector(&format!("alpha == 'beta' && has(ipset-{i})"));
                bench.stage.register(&mut bench.names, &bench.inherited, &selector, &mut Vec::new());
            }
            let before = bench.evals();
            bench.set_object(200, Some(("alpha=beta,ipset-1=true", "namespace-1")));
            costs.push(bench.evals() - before);
        }
        assert!(costs.iter().all(|cost| *cost <= 2), "evaluations with 10 and 1,000 selectors: {costs:?}");
    }
}

/// The shape of OpenStack: every selector asks for the label that all objects have and for one of a
/// security group. Whatever came first, nothing ends up under the common label for good.
#[test]
fn selectors_that_come_before_any_object_are_not_filed_under_the_common_label() {
    let mut bench = Bench::default();
    for i in 0..1_000 {
        let selector = build::selector(&format!("namespace == 'openstack' && has(sg-{i})"));
        bench.stage.register(&mut bench.names, &bench.inherited, &selector, &mut Vec::new());
    }
    let before = bench.evals();
    for id in 0..50 {
        bench.set_object(id, Some((&format!("namespace=openstack,sg-{id},sg-{}", 500 + u32::from(id)), "p")));
    }
    // Two groups each, and the one selector that was the first of all.
    let evals = bench.evals() - before;
    assert!(evals <= 50 * 3, "{evals} evaluations for 50 objects");
    assert_eq!(bench.matches.len(), 100);
}

/// A selector that its own labels decide for all objects is asked once a label set, and makes few lists.
#[test]
fn a_selector_that_matches_all_objects_is_one_more_list() {
    let mut bench = Bench::default();
    for id in 0..200 {
        bench.set_object(id, Some(("alpha=beta,ipset-1=true", &format!("namespace-{id}"))));
    }
    assert_eq!(bench.stage.stats().classes, 200);
    let selector = build::selector("alpha == 'beta' && has(ipset-1)");
    let mut out = Vec::new();
    let (number, _) = bench.stage.register(&mut bench.names, &bench.inherited, &selector, &mut out);
    assert_eq!(out.len(), 200);
    assert_eq!(bench.stage.lists.len(), 1);
    bench.stage.unregister(&mut bench.names, number, &mut out);
    assert_eq!((out.len(), bench.stage.lists.len()), (400, 1));
}

/// G3: a selector costs the objects with its rarest label, not all objects with a common one.
#[test]
fn a_selector_costs_the_objects_with_its_rarest_label() {
    for n in [100, 10_000] {
        let mut bench = Bench::default();
        let mut out = Vec::new();
        for i in 0..n {
            let own = labels(&format!("alpha=beta,ipset-{}=true,id={i}", i % 50));
            bench.stage.join(&mut bench.names, &bench.inherited, &own, &["p".into()], &mut out);
        }
        let mut looked_at = |text: &str| {
            let selector = build::selector(text);
            let mut program = Vec::new();
            program::compile(&mut bench.names, &selector, &mut program);
            let Some(choices) = program::choices(&program) else { return 0 };
            match bench.stage.rarest(&choices) {
                Some(terms) => bench.stage.classes.candidates(terms).count(),
                None => bench.stage.classes.all().count(),
            }
        };
        assert_eq!(looked_at("alpha == 'beta' && has(ipset-7)"), n / 50);
        assert_eq!(looked_at("has(ipset-7) && id == '57'"), 1);
        assert_eq!(looked_at("alpha == 'beta' && has(nothing)"), 0);
        assert_eq!(looked_at("has(alpha) && !has(ipset-7)"), n);
        assert_eq!(looked_at("a in {}"), 0);
        assert_eq!(looked_at("all()"), n);
    }
}

/// Security groups: thousands of machines in the same groups are one class.
#[test]
fn objects_with_equal_labels_are_compared_once() {
    let mut bench = Bench::default();
    bench.set_selector(0, Some("has(sg-a)"));
    for id in 0..100 {
        bench.set_object(id, Some(("sg-a,sg-b", "p")));
    }
    assert_eq!(bench.evals(), 1);
    assert_eq!(bench.stage.stats().classes, 1);
    bench.check();
}
