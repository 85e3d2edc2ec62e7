//! Tests of the language against the vectors, and of its laws.

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::labels::Labels;
use crate::names::{Name, unique_id};

#[test]
fn valid_selectors_have_the_canonical_text_the_id_and_the_matches_of_the_vectors() {
    let vectors = vectors("selectors.json");
    let cases = vectors["valid"].as_array().unwrap();
    assert_eq!(cases.len(), 72);
    for case in cases {
        let selector = Selector::parse(text(&case["selector"])).unwrap_or_else(|error| panic!("{error} in {case}"));
        assert_eq!(selector.canonical(), text(&case["canonical"]), "{case}");
        assert_eq!(selector.id().as_str(), text(&case["id"]), "{case}");
        for evaluation in case["evaluations"].as_array().unwrap() {
            let labels = labels(&evaluation["labels"]);
            assert_eq!(selector.matches(&labels), evaluation["match"].as_bool().unwrap(), "{case} {evaluation}");
        }
    }
}

#[test]
fn what_is_not_a_selector_is_an_error_with_a_position_inside_the_text() {
    let vectors = vectors("selectors.json");
    let cases = vectors["invalid"].as_array().unwrap();
    assert_eq!(cases.len(), 45);
    for case in cases {
        let text = text(&case["selector"]);
        let error = Selector::parse(text).expect_err(text);
        assert!(error.at <= text.len(), "{error} in {text:?}");
    }
}

#[test]
fn prefixes_go_before_every_label_name() {
    let vectors = vectors("selectors.json");
    let cases = vectors["prefixed"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let selector = Selector::parse(text(&case["selector"])).unwrap();
        assert_eq!(selector.prefixed(text(&case["prefix"])), text(&case["result"]), "{case}");
    }
}

#[test]
fn ids_are_the_hash_of_prefix_and_content() {
    let vectors = vectors("ipset_ids.json");
    let cases = vectors["hash"].as_array().unwrap();
    assert_eq!(cases.len(), 7);
    for case in cases {
        assert_eq!(unique_id(text(&case["prefix"]), text(&case["content"])), text(&case["id"]), "{case}");
    }
}

#[test]
fn set_ids_and_kernel_names_are_those_of_the_vectors() {
    use crate::family::Family;
    let vectors = vectors("ipset_ids.json");
    let mut n_checked = 0;
    let mut check = |id: &SetId, case: &Value| {
        n_checked += 1;
        assert_eq!(id.as_str(), text(&case["id"]), "{case}");
        assert_eq!(id.kernel_name(Family::V4), text(&case["kernel_name"]["v4"]), "{case}");
        assert_eq!(id.kernel_name(Family::V6), text(&case["kernel_name"]["v6"]), "{case}");
    };
    for case in vectors["selector_sets"].as_array().unwrap() {
        check(Selector::parse(text(&case["selector"])).unwrap().id(), case);
    }
    for case in vectors["named_port_sets"].as_array().unwrap() {
        let selector = Selector::parse(text(&case["positive_selector"])).unwrap();
        check(&SetId::for_named_port(selector.id(), text(&case["protocol"]), text(&case["port_name"])), case);
    }
    for case in vectors["service_sets"].as_array().unwrap() {
        let (namespace, name) = (text(&case["namespace"]), text(&case["name"]));
        let with_ports = case["type"] == "IP_AND_PORT";
        let id = if with_ports {
            SetId::for_service(namespace, name)
        } else {
            SetId::for_service_addresses(namespace, name)
        };
        check(&id, case);
    }
    assert_eq!(n_checked, 16 + 6 + 4);
}

#[test]
fn normalising_trims_unicode_space_and_keeps_what_does_not_parse() {
    for (given, wanted) in [
        ("", "all()"),
        ("\n", "all()"),
        ("\u{a0}a=='b'\u{2003}\n", "a == \"b\""),
        ("\n a = 'b' ", "a = 'b'"),
        ("a\n== 'b'", "a\n== 'b'"),
    ] {
        assert_eq!(normalise(given), wanted, "{given:?}");
    }
}

#[test]
fn deep_nesting_is_parsed_printed_evaluated_and_dropped_without_stack() {
    let depth = parser::MAX_DEPTH;
    for (open, middle, close) in
        [("(", "has(a)", ")"), ("!(", "has(a)", ")"), ("(b == 'x' || ", "has(a)", ")"), ("!(has(a) && ", "has(a)", ")")]
    {
        let text = format!("{}{middle}{}", open.repeat(depth), close.repeat(depth));
        let selector = Selector::parse(&text).unwrap();
        let present: Labels = [("a", "")].into_iter().collect();
        assert!(selector.matches(&present) || open.starts_with('!'), "{open}");
        assert!(Selector::parse(&selector.canonical()).is_ok(), "{open}");
        assert!(selector.negated().and(&selector).canonical().len() > selector.canonical().len() * 2);

        let text = format!("{}{middle}{}", open.repeat(depth + 1), close.repeat(depth + 1));
        assert_eq!(Selector::parse(&text).unwrap_err().message, "brackets nested too deeply");
    }
    const { assert!(parser::MAX_DEPTH >= 512) };
}

#[test]
fn a_hostile_text_costs_time_in_proportion_to_its_length() {
    let alternatives: Vec<String> = (0..50_000).map(|n| format!("a == '{n}'")).collect();
    let selector = Selector::parse(&alternatives.join(" || ")).unwrap();
    let label = |value: &str| -> Labels { [("a", value)].into_iter().collect() };
    assert!(selector.matches(&label("49999")) && !selector.matches(&label("50000")));
    assert!(Selector::parse(&"(".repeat(1_000_000)).is_err());
    assert!(Selector::parse(&"!".repeat(1_000_001)).is_err());
}

#[test]
fn long_names_and_values_keep_their_length() {
    for length in [0, 1, 63, 64, 65, 4095, 4096, 5000, 300_000] {
        let (value, label) = ("v".repeat(length), "l".repeat(length.clamp(1, 512)));
        let text = format!("({label} == \"{value}\" && {label} in {{\"\", \"{value}ö\"}})");
        let selector = Selector::parse(&text).unwrap();
        assert_eq!(selector.canonical(), text);
        let labels = |value: &str| -> Labels { [(label.as_str(), value)].into_iter().collect() };
        assert_eq!(selector.matches(&labels(&value)), length == 0, "{length}");
        let either = Selector::parse(&text.replace("&&", "||")).unwrap();
        assert!(either.matches(&labels(&value)) && either.matches(&labels(&format!("{value}ö"))), "{length}");
        assert!(!either.matches(&labels("other")), "{length}");
    }
    let text = format!("a == '{}'", "x".repeat(parser::MAX_LENGTH));
    assert_eq!(Selector::parse(&text).unwrap_err().message, "longer than 16 MiB");
}

#[test]
fn a_simple_selector_takes_little_memory() {
    // The tree: a letter, two lengths and the two texts.
    assert!(size_of::<Selector>() <= 32);
    let selector = Selector::parse("projectcalico.org/name == 'namespace-1'").unwrap();
    assert_eq!(selector.tree.packed_len(), 3 + "projectcalico.org/name".len() + "namespace-1".len());
}

#[test]
fn combining_trees_equals_parsing_the_combined_text() {
    for (a, b) in
        [("role == 'web'", "env == 'dev'"), ("a == 'x' && b == 'y'", "!has(c) || has(d)"), ("", "!(!(has(a)))")]
    {
        let (left, right) = (Selector::parse(a).unwrap(), Selector::parse(b).unwrap());
        let a = if a.is_empty() { "all()" } else { a };
        let by_text = Selector::parse(&format!("({a}) && (!({b}))")).unwrap();
        assert_eq!(left.and(&right.negated()).canonical(), by_text.canonical());
        assert_eq!(left.and(&right.negated()).id(), by_text.id());
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*") {
        drop(Selector::parse(&text));
        normalise(&text);
    }

    #[test]
    fn nearly_a_selector_does_not_panic_either(tokens in prop::collection::vec(any_token(), 0..30)) {
        let text: String = tokens.concat();
        if let Ok(selector) = Selector::parse(&text) {
            assert_round_trip(&selector);
        }
    }

    #[test]
    fn printing_and_parsing_again_changes_nothing(text in any_selector()) {
        assert_round_trip(&Selector::parse(&text).unwrap());
    }

    #[test]
    fn selectors_are_equal_exactly_if_their_canonical_texts_are(a in any_selector(), b in any_selector()) {
        let (a, b) = (Selector::parse(&a).unwrap(), Selector::parse(&b).unwrap());
        let made = [a.clone(), b.clone(), a.negated(), b.negated(), a.and(&b), b.and(&a), a.negated().negated()];
        for left in &made {
            for right in &made {
                prop_assert_eq!(left == right, left.canonical() == right.canonical());
            }
        }
    }

    #[test]
    fn negation_and_conjunction_mean_what_they_say(
        a in any_selector(), b in any_selector(), values in prop::collection::vec(any_label(), 0..4)
    ) {
        let labels: Labels = values.into_iter().collect();
        let (a, b) = (Selector::parse(&a).unwrap(), Selector::parse(&b).unwrap());
        prop_assert_eq!(a.and(&b).matches(&labels), a.matches(&labels) && b.matches(&labels));
        prop_assert_eq!(a.negated().matches(&labels), !a.matches(&labels));
    }
}

fn any_token() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "a",
        "b",
        "has(a)",
        "all()",
        "global()",
        "(",
        ")",
        "{",
        "}",
        ",",
        "==",
        "!=",
        "!",
        "&&",
        "||",
        " ",
        "\t",
        "'x'",
        "\"y\"",
        " contains ",
        " starts with ",
        " ends with ",
        " not in ",
        " in ",
        "in",
        "{'x'}",
        "a == 'x'",
        "\n",
        "ö",
    ])
}

fn any_label() -> impl Strategy<Value = (Name, Name)> {
    (prop::sample::select(vec!["a", "b", "c"]), prop::sample::select(vec!["", "x", "y", "xy"]))
        .prop_map(|(label, value)| (label.into(), value.into()))
}

fn any_selector() -> impl Strategy<Value = String> {
    let operation = prop::sample::select(vec![
        "a == 'x'",
        "b != \"x\"",
        "c contains 'y'",
        "a starts with 'x'",
        "b ends with 'y'",
        "c in {'x', '', 'xy'}",
        "a in {}",
        "b not in {'x','y'}",
        "has(a)",
        "has(b)",
        "has(c)",
        "all()",
        "global()",
        "a == 'it\"s'",
    ])
    .prop_map(str::to_owned);
    operation.prop_recursive(5, 40, 4, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a} && {b}")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a}||{b}")),
            inner.clone().prop_map(|a| format!("({a})")),
            inner.clone().prop_map(|a| format!("!({a})")),
            inner.prop_map(|a| format!("! {a}")),
        ]
    })
}

fn assert_round_trip(selector: &Selector) {
    let again = Selector::parse(&selector.canonical()).expect("canonical text parses");
    // Only nested negation is not a fixed point (L-23).
    if !selector.canonical().contains("!!") {
        assert_eq!(again.canonical(), selector.canonical());
    }
}

fn vectors(file: &str) -> Value {
    let path = format!("{}/../../tests/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn labels(value: &Value) -> Labels {
    value.as_object().unwrap().iter().map(|(key, value)| (key.as_str(), text(value))).collect()
}
