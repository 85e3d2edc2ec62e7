//! The table driver without a kernel: what it asks for, byte for byte, and what it makes of the answers.
//!
//! One family: the driver knows its family by name only; `tables_kernel.rs` runs both.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use dataplane::driver::{Driver as _, Next};
use dataplane::iptables::parse::{Entry, Numbered, View, parse};
use dataplane::iptables::{Checks, Features, TableDriver, TableRequest, TableResponse};
use dataplane::{ChainInsertMode, DriverError, Variant};
use program::{Action, BaseChain, Hooks, InterfaceMatch, Match, Origin, Rule, SetName, Side, Table, TableChanges};

use support::*;

const EMPTY: &str =
    "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n# Completed on a day\n";

// The vectors of the specification (netfilter.md 16.8).

#[test]
fn restore_input_equals_the_vectors() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/rule_rendering.json");
    let vectors: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = vectors["table_sync"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let id = text("id");
        let variant = if text("backend") == "nft" { Variant::Nft } else { Variant::Legacy };
        let mode = if text("insert_mode") == "append" { ChainInsertMode::Append } else { ChainInsertMode::Insert };
        let mut driver = driver(variant, mode);
        driver.want(vector_program());
        let mut kernel = Script { driver: &mut driver, now: Instant::now() };
        // The vectors leave out the line that completes a listing.
        kernel.expect_save(&format!("{}# Completed on a day\n", text("save_before")));
        kernel.expect_restore(text("restore_input"), id);
        kernel.expect_idle(id);
        let second = text("second_restore_input");
        if second.is_empty() {
            continue;
        }
        kernel.driver.want(if id.starts_with("shrink") { vector_shrink() } else { vector_growth() });
        kernel.expect_restore(second, id);
        kernel.expect_idle(id);
    }
}

/// The program of all vectors. The policy chain that nothing refers to is not given to the driver.
fn vector_program() -> TableChanges {
    let mark = 0x10000;
    let accepted = Rule::new(vec![Match::MarkIs { value: mark, mask: mark }], Action::Accept)
        .comment("Policy explicitly accepted packet.");
    let mut changes = TableChanges::default();
    put(
        &mut changes,
        "cali-FORWARD",
        vec![Rule::new(
            vec![Match::In(InterfaceMatch::Prefix("cali".to_owned()))],
            Action::Jump(name("cali-from-wl-dispatch")),
        )],
    );
    put(&mut changes, "cali-from-wl-dispatch", vec![unknown_interface()]);
    let hooks = Hooks {
        inserts: vec![jump("cali-FORWARD")],
        appends: vec![accepted, Rule::new(Vec::new(), Action::SetMark(mark))],
    };
    changes.hooks.insert(BaseChain::Forward, hooks);
    changes
}

fn vector_growth() -> TableChanges {
    let mut changes = TableChanges::default();
    let workload = Match::In(InterfaceMatch::Exact("cali1".to_owned()));
    let dispatch = Rule::new(vec![workload], Action::Goto(name("cali-fw-cali1")));
    put(&mut changes, "cali-from-wl-dispatch", vec![dispatch, unknown_interface()]);
    put(&mut changes, "cali-fw-cali1", vec![drop_all()]);
    changes
}

fn vector_shrink() -> TableChanges {
    let mut changes = TableChanges::default();
    put(&mut changes, "cali-from-wl-dispatch", Vec::new());
    changes
}

fn unknown_interface() -> Rule {
    drop_all().comment("Unknown interface")
}

// Reading and believing.

/// U6.d: of a table that was read over netlink there are no texts to remove rules by.
#[test]
fn a_rule_without_a_text_goes_by_its_number_when_what_replaces_it_is_in_force() {
    let stale = |handle| Entry::Numbered { hash: None, handle };
    let mut view = View::default();
    view.shared.insert("FORWARD".into(), vec![Entry::Foreign, stale(7)]);
    view.shared.insert("DOCKER".into(), vec![stale(9)]);
    view.ours.insert("cali-old".into(), vec![None]);
    let mut driver = driver(Variant::Nft, ChainInsertMode::Insert);
    driver.want(vector_program());
    let now = Instant::now();
    assert!(matches!(driver.next(now), Next::Do(TableRequest::Save { .. })));
    driver.handle(TableResponse::Listed(view), now).unwrap();
    let Next::Do(TableRequest::Restore(input)) = driver.next(now) else { panic!() };
    assert!(input.contains("-I FORWARD ") && !input.contains("-D ") && !input.contains("delete-chain"), "{input}");
    driver.handle(TableResponse::Done(String::new()), now).unwrap();
    assert!(!driver.is_settled());
    let number = |chain: &str, handle| Numbered { chain: chain.into(), handle };
    let rules = vec![number("DOCKER", 9), number("FORWARD", 7)];
    assert_eq!(driver.next(now), Next::Do(TableRequest::Remove { table: Table::Filter, rules }));
    driver.handle(TableResponse::Done(String::new()), now).unwrap();

    // The next look shows that nothing leads to the stale chain any more.
    assert!(matches!(driver.next(now), Next::Do(TableRequest::Save { .. })));
    let mut view = parse(Table::Filter, &as_listed(&input)).unwrap();
    view.ours.insert("cali-old".into(), vec![None]);
    driver.handle(TableResponse::Listed(view), now).unwrap();
    let Next::Do(TableRequest::Restore(input)) = driver.next(now) else { panic!() };
    assert_eq!(&*input, "*filter\n:cali-old - -\nCOMMIT\n*filter\n:cali-old - -\n--delete-chain cali-old\nCOMMIT\n");
    driver.handle(TableResponse::Done(String::new()), now).unwrap();
    assert_eq!(driver.next(now), Next::Idle);
    assert!(driver.is_settled());
}

#[test]
fn nothing_is_written_when_the_kernel_is_as_wanted() {
    for variant in [Variant::Legacy, Variant::Nft] {
        for mode in [ChainInsertMode::Insert, ChainInsertMode::Append] {
            let mut first = driver(variant, mode);
            first.want(vector_program());
            let mut kernel = Script { driver: &mut first, now: Instant::now() };
            kernel.expect_save(EMPTY);
            let Next::Do(TableRequest::Restore(input)) = kernel.driver.next(kernel.now) else { panic!() };
            let listing = as_listed(&input);

            let mut second = driver(variant, mode);
            second.want(vector_program());
            let mut kernel = Script { driver: &mut second, now: Instant::now() };
            kernel.expect_save(&listing);
            kernel.expect_idle("unchanged");
            assert_eq!(second.take_stats().writes, 0);
            assert!(second.is_settled());
        }
    }
}

#[test]
fn a_table_that_cannot_be_read_is_not_written_and_read_again_later() {
    let truncated = &EMPTY[..EMPTY.len() - "# Completed on a day\n".len()];
    let answers = [
        TableResponse::Done(truncated.to_owned()),
        TableResponse::Done("# Table `filter' is incompatible, use 'nft' tool.\n".to_owned()),
        TableResponse::Refused { program: "save".to_owned(), status: 1, stderr: "no".to_owned(), lines_before: 0 },
        TableResponse::Broken(DriverError::Timeout { program: "save".to_owned(), after: Duration::from_secs(1) }),
    ];
    for answer in answers {
        let mut driver = driver(Variant::Nft, ChainInsertMode::Insert);
        driver.want(vector_program());
        let now = Instant::now();
        assert!(matches!(driver.next(now), Next::Do(TableRequest::Save { .. })));
        driver.handle(answer, now).unwrap_err();
        assert!(!driver.is_settled());
        let Next::NotBefore(later) = driver.next(now) else { panic!("writes without having read") };
        assert!(driver.due().is_some_and(|(at, _)| at == later));
        assert!(matches!(driver.next(later), Next::Do(TableRequest::Save { .. })));
    }
}

/// I3 and I8: it is tried for ever, ever more seldom, and says the same each time, so that the log says it once.
#[test]
fn a_table_that_its_own_program_cannot_list_is_told_of_in_one_line_and_not_written() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(vector_program());
        let mut now = Instant::now();
        let mut said = std::collections::BTreeSet::new();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert!(matches!(driver.next(now), Next::Do(TableRequest::Save { .. })));
            let error = driver.handle(refused("Couldn't load match `mystery':No such file or directory\n"), now);
            said.insert(error.unwrap_err().full_text());
            let Next::NotBefore(later) = driver.next(now) else { panic!("writes without having read") };
            pauses.push(later - now);
            now = later;
        }
        let texts: Vec<_> = said.iter().map(String::as_str).collect();
        let expected = "table filter/4 cannot be listed, so nothing is written to it: `restore` exited with status 1: \
                        Couldn't load match `mystery':No such file or directory";
        assert_eq!(texts, [expected]);
        assert!(pauses.is_sorted() && pauses[8..] == [Duration::from_secs(10); 4], "{pauses:?}");
        assert_eq!(driver.failing(), Some(expected));

        // Whoever put the rule there takes it away.
        let mut kernel = Script { driver: &mut driver, now };
        kernel.expect_save(EMPTY);
        assert!(matches!(kernel.driver.next(now), Next::Do(TableRequest::Restore(_))));
    }
}

#[test]
fn a_listing_in_the_background_that_is_of_no_use_is_news_once() {
    let mut driver = settled(Variant::Legacy);
    let now = Instant::now();
    for news in [true, false, false] {
        let error = driver.take_sweep(refused("mystery"), now).unwrap_err().full_text();
        assert_eq!(driver.could_not_check(&error), news);
    }
    assert!(driver.could_not_check("another reason"));
    assert!(driver.is_settled(), "what was believed is believed on");
    driver.take_sweep(TableResponse::Done(EMPTY.to_owned()), now).unwrap();
    assert!(driver.could_not_check("another reason"));
}

#[test]
fn a_failed_refresh_takes_all_belief_away() {
    let mut driver = settled(Variant::Legacy);
    let later = Instant::now() + 2 * REFRESH;
    assert!(matches!(driver.next(later), Next::Do(TableRequest::Save { .. })));
    driver.handle(TableResponse::Done("*filter\n".to_owned()), later).unwrap_err();
    driver.want(vector_growth());
    assert!(matches!(driver.next(later), Next::NotBefore(_)));
    assert!(matches!(driver.next(later + Duration::from_secs(1)), Next::Do(TableRequest::Save { .. })));
}

#[test]
fn an_answer_that_never_came_leads_to_a_new_listing() {
    let mut driver = settled(Variant::Legacy);
    driver.want(vector_growth());
    let now = Instant::now();
    assert!(matches!(driver.next(now), Next::Do(TableRequest::Restore(_))));
    assert!(matches!(driver.next(now), Next::Do(TableRequest::Save { .. })));
}

#[test]
fn the_table_is_read_again_when_the_refresh_interval_is_over() {
    let mut driver = settled(Variant::Nft);
    let (due, _) = driver.due().unwrap();
    assert_eq!(driver.next(due - Duration::from_millis(1)), Next::Idle);
    assert_eq!(driver.next(due), Next::Do(TableRequest::Save { table: Table::Filter, if_loaded: false }));
}

#[test]
fn looks_after_a_write_come_at_growing_intervals() {
    let checks = Checks { refresh: None, after_write: Duration::from_secs(5) };
    let mut driver = TableDriver::new(FILTER, setup(Variant::Nft, ChainInsertMode::Insert), checks);
    driver.want(vector_program());
    let start = Instant::now();
    let mut kernel = FakeKernel::new(Variant::Nft);
    kernel.run(&mut driver, start).unwrap();
    let mut looks = Vec::new();
    while let Some((due, _)) = driver.due() {
        looks.push((due - start).as_secs());
        kernel.run(&mut driver, due).unwrap();
        assert_eq!(driver.take_stats().reads, if looks.len() == 1 { 2 } else { 1 });
    }
    assert_eq!(looks, [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560]);
    // The next write starts over.
    driver.want(vector_growth());
    let later = start + Duration::from_secs(10_000);
    kernel.run(&mut driver, later).unwrap();
    assert_eq!(driver.due().map(|(due, _)| due - later), Some(Duration::from_secs(5)));
}

#[test]
fn foreign_changes_are_counted_and_repaired_at_the_refresh() {
    let listing = |forward: &str, dispatch: &str| {
        format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:cali-FORWARD - [0:0]\n:cali-from-wl-dispatch - [0:0]\n\
             {forward}\
             -A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
             -A FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" -j ACCEPT\n\
             -A FORWARD -m comment --comment \"cali:mp77cMpurHhyjLrM\" -j MARK --set-xmark 0x10000/0x10000\n\
             -A cali-FORWARD -m comment --comment \"cali:X3vB2lGcBrfkYquC\" -i cali+ -j cali-from-wl-dispatch\n\
             {dispatch}COMMIT\n\
             # Completed on a day\n"
        )
    };
    let ours = "-A cali-from-wl-dispatch -m comment --comment \"cali:zTj6P0TIgYvgz-md\" -j DROP\n";
    let accept = "-A cali-from-wl-dispatch -j ACCEPT\n";
    let rewritten = "-A cali-from-wl-dispatch -m comment --comment \"cali:zTj6P0TIgYvgz-md\" \
                     -m comment --comment \"Unknown interface\" --jump DROP\n";
    let hooks_again = "-D FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
         -D FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" -j ACCEPT\n\
         -D FORWARD -m comment --comment \"cali:mp77cMpurHhyjLrM\" -j MARK --set-xmark 0x10000/0x10000\n\
         -I FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" --jump cali-FORWARD\n\
         -A FORWARD -m comment --comment \"cali:S93hcgKJrXEqnTfs\" \
         -m comment --comment \"Policy explicitly accepted packet.\" -m mark --mark 0x10000/0x10000 --jump ACCEPT\n\
         -A FORWARD -m comment --comment \"cali:mp77cMpurHhyjLrM\" --jump MARK --set-mark 0x10000/0x10000\n";
    let cases = [
        ("untouched", Variant::Legacy, listing("", ours), String::new()),
        ("our rule deleted", Variant::Legacy, listing("", ""), rewritten.to_owned()),
        (
            "foreign rule above ours",
            Variant::Legacy,
            listing("", &format!("{accept}{ours}")),
            rewritten.replace("-A cali-from-wl-dispatch", "-R cali-from-wl-dispatch 1")
                + "-D cali-from-wl-dispatch 2\n",
        ),
        (
            "foreign rule below ours",
            Variant::Legacy,
            listing("", &format!("{ours}{accept}")),
            "-D cali-from-wl-dispatch 2\n".to_owned(),
        ),
        ("our rule deleted", Variant::Nft, listing("", ""), format!(":cali-from-wl-dispatch - -\n{rewritten}")),
        ("foreign rule above our hook", Variant::Nft, listing("-A FORWARD -j DROP\n", ours), hooks_again.to_owned()),
    ];
    for (what, variant, listing, repair) in cases {
        let mut driver = settled(variant);
        let later = Instant::now() + 2 * REFRESH;
        let mut kernel = Script { driver: &mut driver, now: later };
        kernel.expect_save(&listing);
        let differs = !repair.is_empty();
        if differs {
            kernel.expect_restore(&format!("*filter\n{repair}COMMIT\n"), what);
        }
        kernel.expect_idle(what);
        assert_eq!(driver.take_stats().repaired, u64::from(differs), "{what}");
    }
}

#[test]
fn rules_of_ours_in_chains_that_we_never_hooked_are_removed_and_similar_names_are_not_ours() {
    let before = "*filter\n:FORWARD ACCEPT [0:0]\n:DOCKER-USER - [0:0]\n:calico-dhcp-x - [0:0]\n:neutron - [0:0]\n:felix-x - [0:0]\n\
                  -A DOCKER-USER -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j RETURN\n\
                  -A DOCKER-USER -j felix-x\n\
                  -A DOCKER-USER -j calico-dhcp-x\n\
                  -A FORWARD -j calico-dhcp-x\n-A calico-dhcp-x -j ACCEPT\n-A neutron -j ACCEPT\nCOMMIT\n# Completed on a day\n";
    let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
    let mut kernel = Script { driver: &mut driver, now: Instant::now() };
    kernel.expect_save(before);
    let expected = "*filter\n:felix-x - -\n\
                    -D DOCKER-USER -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j RETURN\n\
                    -D DOCKER-USER -j felix-x\n--delete-chain felix-x\nCOMMIT\n";
    kernel.expect_restore(expected, "sweep");
    kernel.expect_idle("sweep");
}

#[test]
fn a_legacy_table_that_nobody_made_is_not_made_by_looking() {
    let mut nothing = TableDriver::new(FILTER, setup(Variant::Legacy, ChainInsertMode::Insert), CHECKS);
    let now = Instant::now();
    assert_eq!(nothing.next(now), Next::Do(TableRequest::Save { table: Table::Filter, if_loaded: true }));
    nothing.handle(TableResponse::NotLoaded, now).unwrap();
    assert_eq!(nothing.next(now), Next::Idle);
    assert!(nothing.is_settled());
}

#[test]
fn changed_features_change_hashes_and_only_chains_whose_text_changes_are_written() {
    let mut changes = TableChanges::default();
    let nflog = Action::NfLog { group: 1, prefix: "x".to_owned() };
    put(&mut changes, "cali-a", vec![Rule::new(Vec::new(), nflog), jump("cali-b")]);
    put(&mut changes, "cali-b", vec![drop_all()]);
    let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
    driver.want(changes);
    let mut kernel = Script { driver: &mut driver, now: Instant::now() };
    kernel.expect_save(EMPTY);
    let Next::Do(TableRequest::Restore(input)) = kernel.driver.next(kernel.now) else { panic!() };
    kernel.driver.handle(TableResponse::Done(String::new()), kernel.now).unwrap();
    kernel.driver.set_features(Features { nflog_size: false, ..Features::default() });
    kernel.expect_save(&as_listed(&input));
    let Next::Do(TableRequest::Restore(input)) = kernel.driver.next(kernel.now) else { panic!() };
    let ops: Vec<_> = input.lines().map(|line| line.split(" -m").next().unwrap()).collect();
    assert_eq!(ops, ["*filter", "-R cali-a 1", "-R cali-a 2", "COMMIT"]);
}

// Refusals.

#[test]
fn a_refused_policy_is_closed_and_everything_else_goes_in() {
    // The legacy variant blames the COMMIT, the nft variant the line of the rule.
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(policies(50, &[17]));
        let now = Instant::now();
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, now).unwrap();
        assert!(driver.is_settled());
        assert_eq!(driver.held().len(), 1);
        assert!(
            driver.held()[0]
                .starts_with("chain cali-pi-17 is closed: rule policy np/ns/policy-17 ingress rule 1 refused: "),
            "{:?}",
            driver.held()
        );
        let bad = kernel.rules("cali-pi-17");
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert!(bad[0].ends_with("--jump DROP"));
        assert_eq!(kernel.rules("cali-pi-16").len(), 3);
        assert_eq!(kernel.rules("cali-all").len(), 50);
        assert!(kernel.rules("cali-probe").is_empty());
        assert!(kernel.requests < 30, "{} requests", kernel.requests);

        // Nothing more is tried until the policy changes.
        assert_eq!(driver.next(now), Next::Idle);
        let mut repaired = TableChanges::default();
        put(&mut repaired, "cali-pi-17", policy_rules(17, false));
        driver.want(repaired);
        kernel.run(&mut driver, now).unwrap();
        assert!(driver.held().is_empty());
        assert_eq!(kernel.rules("cali-pi-17").len(), 3);
    }
}

/// What refuses a rule may be a passing lack of memory, of which nobody tells when it is over (U6, I8).
#[test]
fn a_refused_rule_is_tried_again_at_growing_intervals_and_goes_in_when_the_kernel_takes_it() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(policies(5, &[3]));
        let mut now = Instant::now();
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, now).unwrap();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let (due, _) = driver.next_attempt().expect("another attempt");
            pauses.push((due - now).as_secs());
            now = due;
            kernel.run(&mut driver, now).unwrap();
            assert_eq!(driver.held().len(), 1, "still refused");
            assert_eq!(kernel.rules("cali-pi-3").len(), 1, "and closed");
        }
        assert_eq!(pauses, [180, 360, 720, 1440, 2880, 3600, 3600]);
        kernel.forgives = true;
        let (due, _) = driver.next_attempt().expect("another attempt");
        kernel.run(&mut driver, due).unwrap();
        assert!(driver.held().is_empty() && driver.is_settled());
        assert_eq!(kernel.rules("cali-pi-3").len(), 3);
        assert_eq!(driver.next_attempt(), None);
    }
}

#[test]
fn several_refused_policies_are_found_in_one_apply() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(policies(30, &[0, 7, 8, 29]));
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, Instant::now()).unwrap();
        assert!(driver.is_settled());
        assert_eq!(driver.held().len(), 4);
        assert_eq!(kernel.rules("cali-all").len(), 30);
    }
}

#[test]
fn a_refused_chain_that_belongs_to_no_object_keeps_its_last_contents_and_what_they_refer_to() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        let mut changes = TableChanges::default();
        put(&mut changes, "cali-tw-a", vec![jump("cali-old")]);
        put(&mut changes, "cali-old", vec![drop_all()]);
        changes.hooks.insert(BaseChain::Forward, Hooks { inserts: vec![jump("cali-tw-a")], appends: Vec::new() });
        driver.want(changes);
        let now = Instant::now();
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, now).unwrap();

        let mut changes = TableChanges::default();
        put(&mut changes, "cali-tw-a", vec![refused_rule(), jump("cali-new")]);
        put(&mut changes, "cali-new", vec![drop_all()]);
        changes.chains.insert(name("cali-old"), None);
        driver.want(changes);
        kernel.run(&mut driver, now).unwrap();
        assert_eq!(driver.held().len(), 1);
        assert!(driver.held()[0].contains("unchanged"), "{:?}", driver.held());
        assert!(driver.is_settled() && driver.may_name_old_sets());
        assert_eq!(kernel.rules("cali-old").len(), 1);
        assert_eq!(kernel.rules("cali-new").len(), 1);
        assert!(kernel.rules("cali-tw-a")[0].ends_with("--jump cali-old"));

        let mut changes = TableChanges::default();
        put(&mut changes, "cali-tw-a", vec![jump("cali-new")]);
        driver.want(changes);
        kernel.run(&mut driver, now).unwrap();
        assert!(driver.held().is_empty() && !driver.may_name_old_sets());
        assert!(kernel.rules("cali-tw-a")[0].ends_with("--jump cali-new"));
        assert!(!kernel.has("cali-old"));
    }
}

#[test]
fn a_refused_chain_that_hooks_lead_to_is_an_error_and_never_closed() {
    let mut driver = driver(Variant::Nft, ChainInsertMode::Insert);
    let mut changes = TableChanges::default();
    put(&mut changes, "cali-INPUT", vec![refused_rule()]);
    changes.hooks.insert(BaseChain::Input, Hooks { inserts: vec![jump("cali-INPUT")], appends: Vec::new() });
    driver.want(changes);
    let mut kernel = FakeKernel::new(Variant::Nft);
    let error = kernel.run(&mut driver, Instant::now()).unwrap_err();
    assert!(matches!(error, DriverError::RuleRefused { .. }), "{error}");
    assert!(!driver.is_settled());
    assert!(!kernel.has("cali-INPUT"));
}

#[test]
fn a_refusal_for_another_reason_than_a_rule_is_retried_and_closes_nothing() {
    let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
    driver.want(policies(3, &[]));
    let mut kernel = FakeKernel::new(Variant::Legacy);
    kernel.broken = Some("iptables-restore: line 99 failed");
    let now = Instant::now();
    kernel.run(&mut driver, now).unwrap_err();
    assert!(driver.held().is_empty());
    assert!(matches!(driver.next(now), Next::NotBefore(_)));
    kernel.broken = None;
    kernel.run(&mut driver, now + Duration::from_secs(20)).unwrap();
    assert!(driver.is_settled());
}

#[test]
fn a_missing_set_and_a_busy_lock_are_told_apart_from_bad_rules() {
    for (stderr, is_set) in [
        ("iptables-restore v1.8.9 (legacy): Set cali40s:x doesn't exist.\n\nError occurred at line: 3\n", true),
        ("Another app is currently holding the xtables lock. Perhaps you want to use the -w option?\n", false),
    ] {
        let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
        driver.want(policies(3, &[]));
        let mut kernel = FakeKernel::new(Variant::Legacy);
        kernel.broken = Some(stderr);
        let error = kernel.run(&mut driver, Instant::now()).unwrap_err();
        if is_set {
            assert!(matches!(&error, DriverError::SetMissing { set, .. } if set == "cali40s:x"), "{error}");
        } else {
            assert!(matches!(error, DriverError::LockBusy { .. }), "{error}");
        }
        assert!(driver.held().is_empty());
    }
}

#[test]
fn a_chain_of_ours_that_foreign_rules_refer_to_is_emptied_and_left() {
    let before = "*filter\n:FORWARD ACCEPT [0:0]\n:X - [0:0]\n:cali-old - [0:0]\n:cali-gone - [0:0]\n\
                  -A X -g cali-old\n-A cali-old -j DROP\nCOMMIT\n# Completed on a day\n";
    let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
    let mut kernel = Script { driver: &mut driver, now: Instant::now() };
    kernel.expect_save(before);
    let Next::Do(TableRequest::Restore(_)) = kernel.driver.next(kernel.now) else { panic!() };
    kernel.driver.handle(refused("iptables-restore: line 5 failed"), kernel.now).unwrap();
    kernel.expect_save(before);
    let expected = "*filter\n:cali-gone - -\n:cali-old - -\n--delete-chain cali-gone\nCOMMIT\n";
    kernel.expect_restore(expected, "left");
    kernel.expect_idle("left");
    kernel.driver.distrust();
    kernel.expect_save("*filter\n:FORWARD ACCEPT [0:0]\n:X - [0:0]\n:cali-old - [0:0]\n-A X -g cali-old\nCOMMIT\n# Completed on a day\n");
    kernel.expect_idle("still left");
}

// Sets that could not be written (I4).

#[test]
fn a_chain_that_names_an_unwritten_set_waits_closed_while_the_rest_goes_in() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(policies(3, &[]));
        let now = Instant::now();
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, now).unwrap();

        let set = SetName::new("cali40s:x").unwrap();
        let in_set = Match::Set { side: Side::Source, negated: false, set: set.clone(), with_port: false };
        let rule = || with_origin(Rule::new(vec![in_set.clone()], Action::Accept), 9);
        let mut changes = TableChanges::default();
        put(&mut changes, "cali-pi-0", vec![rule()]);
        put(&mut changes, "cali-pi-9", vec![rule()]);
        put(&mut changes, "cali-pi-1", vec![drop_all()]);
        put(&mut changes, "cali-all", [0, 1, 2, 9].map(|n| jump(&format!("cali-pi-{n}"))).to_vec());
        driver.want(changes);
        driver.begin(&[(set, false)].into());
        kernel.run(&mut driver, now).unwrap();
        // Its last contents beside the others' new ones might let through what neither program does.
        assert!(kernel.rules("cali-pi-0")[0].ends_with("--jump DROP"), "closed");
        assert!(kernel.rules("cali-pi-9")[0].ends_with("--jump DROP"), "a new chain is closed");
        assert_eq!(kernel.rules("cali-pi-1").len(), 1, "others proceed");
        assert_eq!(driver.held().len(), 2);

        driver.begin(&[].into());
        kernel.run(&mut driver, now).unwrap();
        for chain in ["cali-pi-0", "cali-pi-9"] {
            assert!(kernel.rules(chain)[0].contains("--match-set cali40s:x src"), "{chain}");
        }
        assert!(driver.held().is_empty() && !driver.may_name_old_sets());
    }
}

#[test]
fn a_chain_that_names_an_unwritten_set_keeps_its_contents_as_long_as_nothing_else_changes() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut driver = driver(variant, ChainInsertMode::Insert);
        driver.want(policies(3, &[]));
        let now = Instant::now();
        let mut kernel = FakeKernel::new(variant);
        kernel.run(&mut driver, now).unwrap();

        let set = SetName::new("cali40s:x").unwrap();
        let in_set = Match::Set { side: Side::Source, negated: false, set: set.clone(), with_port: false };
        let mut changes = TableChanges::default();
        put(&mut changes, "cali-pi-0", vec![with_origin(Rule::new(vec![in_set], Action::Accept), 9)]);
        driver.want(changes);
        driver.begin(&[(set.clone(), false)].into());
        kernel.run(&mut driver, now).unwrap();
        assert_eq!(kernel.rules("cali-pi-0").len(), 3, "keeps its last contents");
        assert!(driver.held()[0].starts_with("chain cali-pi-0 is unchanged"), "{:?}", driver.held());
        assert!(driver.may_name_old_sets());

        let mut changes = TableChanges::default();
        put(&mut changes, "cali-pi-1", vec![drop_all()]);
        driver.want(changes);
        driver.begin(&[(set, false)].into());
        kernel.run(&mut driver, now).unwrap();
        assert_eq!(kernel.rules("cali-pi-1").len(), 1);
        assert!(kernel.rules("cali-pi-0")[0].ends_with("--jump DROP"), "closed with the other's change");
        assert!(driver.held()[0].starts_with("chain cali-pi-0 is closed"), "{:?}", driver.held());

        driver.begin(&[].into());
        kernel.run(&mut driver, now).unwrap();
        assert!(kernel.rules("cali-pi-0")[0].contains("--match-set cali40s:x src"));
        assert!(driver.held().is_empty() && driver.is_settled());
    }
}

// Order of tables (netfilter.md 19.2).

#[test]
fn a_change_that_lets_more_through_is_told_from_one_that_lets_less_through() {
    let accept = || Rule::new(Vec::new(), Action::Accept);
    let cases = [
        ("accept added", vec![drop_all()], Some(vec![accept(), drop_all()]), true),
        ("accept removed", vec![accept(), drop_all()], Some(vec![drop_all()]), false),
        ("drop added", vec![accept()], Some(vec![drop_all(), accept()]), false),
        ("drop removed", vec![drop_all(), jump("cali-b")], Some(vec![jump("cali-b")]), true),
        ("chain with drop removed", vec![drop_all()], None, true),
        ("chain with accept removed", vec![accept()], None, false),
    ];
    for (what, before, after, loosens) in cases {
        let mut driver = driver(Variant::Legacy, ChainInsertMode::Insert);
        let mut changes = TableChanges::default();
        put(&mut changes, "cali-a", before);
        put(&mut changes, "cali-b", vec![drop_all()]);
        driver.want(changes);
        assert!(!driver.loosens(), "{what}: at the start nothing is known to be stricter");
        FakeKernel::new(Variant::Legacy).run(&mut driver, Instant::now()).unwrap();
        let mut changes = TableChanges::default();
        changes.chains.insert(name("cali-a"), after.map(|rules| chain("cali-a", rules)));
        driver.want(changes);
        assert_eq!(driver.loosens(), loosens, "{what}");
    }
}

// Helpers.

/// Answers requests by hand.
struct Script<'a> {
    driver: &'a mut TableDriver,
    now: Instant,
}

impl Script<'_> {
    #[track_caller]
    fn expect_save(&mut self, listing: &str) {
        let next = self.driver.next(self.now);
        assert!(matches!(next, Next::Do(TableRequest::Save { table: Table::Filter, .. })), "{next:?}");
        self.driver.handle(TableResponse::Done(listing.to_owned()), self.now).unwrap();
    }

    #[track_caller]
    fn expect_restore(&mut self, input: &str, what: &str) {
        let next = self.driver.next(self.now);
        let Next::Do(TableRequest::Restore(text)) = next else { panic!("{what}: {next:?}") };
        assert_eq!(&*text, input, "{what}");
        self.driver.handle(TableResponse::Done(String::new()), self.now).unwrap();
    }

    #[track_caller]
    fn expect_idle(&mut self, what: &str) {
        assert_eq!(self.driver.next(self.now), Next::Idle, "{what}");
    }
}

/// A driver whose program is in the kernel.
fn settled(variant: Variant) -> TableDriver {
    let mut driver = driver(variant, ChainInsertMode::Insert);
    driver.want(vector_program());
    FakeKernel::new(variant).run(&mut driver, Instant::now()).unwrap();
    assert!(driver.is_settled());
    driver.take_stats();
    driver
}

/// What a save program prints after this input went into an empty table.
fn as_listed(input: &str) -> String {
    let mut kernel = FakeKernel::new(Variant::Legacy);
    kernel.restore(input);
    kernel.list()
}

/// A chain that leads to policies of three rules; those in `refused` have a rule that the kernel refuses.
fn policies(count: u32, refused: &[u32]) -> TableChanges {
    let mut changes = TableChanges::default();
    for number in 0..count {
        put(&mut changes, &format!("cali-pi-{number}"), policy_rules(number, refused.contains(&number)));
    }
    put(&mut changes, "cali-all", (0..count).map(|number| jump(&format!("cali-pi-{number}"))).collect());
    changes.hooks.insert(BaseChain::Forward, Hooks { inserts: vec![jump("cali-all")], appends: Vec::new() });
    changes
}

fn policy_rules(number: u32, refused: bool) -> Vec<Rule> {
    let middle = if refused { refused_rule() } else { drop_all() };
    [drop_all(), middle, drop_all()].into_iter().map(|rule| with_origin(rule, number)).enumerate().map(at).collect()
}

fn at((index, mut rule): (usize, Rule)) -> Rule {
    if let Some(Origin::Policy { index: place, .. }) = &mut rule.origin {
        *place = u32::try_from(index).unwrap();
    }
    rule
}
