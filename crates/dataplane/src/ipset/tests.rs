//! The set driver against a kernel in memory.

use program::{SetKind, SetSpec};
use proptest::prelude::*;

use program::Member;

use super::fake::{FakeSet, FakeTransport};
use super::transport::{Op, SetError};
use super::*;

mod together;

struct Bed {
    now: Instant,
    kernel: FakeTransport,
    sets: IpSets,
}

impl Bed {
    fn new() -> Self {
        let now = Instant::now();
        let kernel = FakeTransport::new(now);
        let options = Options { largest_set: 8, ..Options::default() };
        let sets = IpSets::new(&options, Box::new(kernel.clone()));
        Self { now, kernel, sets }
    }

    fn want(&mut self, set: &str, members: &str) {
        self.want_spec(spec(set, SetKind::Net, 100), members);
    }

    fn want_spec(&mut self, spec: SetSpec, members: &str) {
        let (family, name) = (spec.family, spec.name.clone());
        self.sets.want(family, &name, SetChange::Replace { spec, members: nets(members).into() });
    }

    fn change(&mut self, set: &str, added: &str, removed: &str) {
        let change = SetChange::Delta { added: nets(added).into(), removed: nets(removed).into() };
        self.sets.want(family_of(set), &name(set), change);
    }

    fn unwant(&mut self, set: &str) {
        self.sets.want(family_of(set), &name(set), SetChange::Remove);
    }

    fn put(&mut self, set: &str, members: &str) {
        let spec = spec(set, SetKind::Net, 100);
        self.kernel.kernel().sets.insert(set.to_owned(), fake(&spec, &nets(members)));
    }

    /// Both halves of an apply; returns writes and errors.
    fn apply(&mut self) -> (u64, Vec<String>) {
        let first = self.sets.write_additions(self.now);
        let second = self.sets.write_removals(self.now);
        (first.writes + second.writes, [first.errors, second.errors].concat())
    }

    /// `a=10.0.0.0/8,…` per set of the kernel.
    fn state(&self) -> Vec<String> {
        let kernel = self.kernel.kernel();
        kernel
            .sets
            .iter()
            .map(|(name, set)| {
                let members: Vec<String> = set.members.iter().map(show).collect();
                format!("{name}={}", members.join(","))
            })
            .collect()
    }

    fn log(&self) -> Vec<String> {
        let ops = std::mem::take(&mut self.kernel.kernel().log);
        ops.iter()
            .map(|op| match op {
                Op::Create { name, hash_size, .. } => format!("create {name} {hash_size}"),
                Op::Add { set, members } => format!("add {set} {}", members.len()),
                Op::Remove { set, members } => format!("remove {set} {}", members.len()),
                Op::Swap { set, with } => format!("swap {set} {with}"),
                Op::Destroy { set } => format!("destroy {set}"),
            })
            .collect()
    }
}

fn name(text: &str) -> SetName {
    SetName::new(text).unwrap()
}

fn family_of(set: &str) -> Family {
    if set.starts_with("cali6") { Family::V6 } else { Family::V4 }
}

fn spec(set: &str, kind: SetKind, max_members: u32) -> SetSpec {
    SetSpec { name: name(set), family: family_of(set), kind, max_members }
}

fn nets(text: &str) -> BTreeSet<Member> {
    text.split_whitespace().map(|net| Member::Net(net.parse().unwrap())).collect()
}

fn show(member: &Member) -> String {
    match member {
        Member::Address(address) => address.to_string(),
        Member::Net(net) => net.to_string(),
        Member::AddressPort { address, protocol, port } => format!("{address},{protocol}:{port}"),
    }
}

fn fake(spec: &SetSpec, members: &BTreeSet<Member>) -> FakeSet {
    FakeSet {
        kind: spec.kind,
        family: spec.family,
        max_members: spec.max_members,
        odd: false,
        referenced: false,
        members: members.clone(),
    }
}

#[test]
fn x_10_additions_come_with_the_first_half_and_removals_with_the_second() {
    for (a, b, c) in [("cali40a", "10.0.0.0/8", "11.0.0.0/8"), ("cali60a", "fd00::/16", "fd01::/16")] {
        let mut bed = Bed::new();
        bed.put(a, b);
        bed.want(a, c);
        bed.sets.write_additions(bed.now);
        assert_eq!(bed.log(), [format!("add {a} 1")]);
        assert_eq!(bed.state(), [format!("{a}={b},{c}")]);
        bed.sets.write_removals(bed.now);
        assert_eq!(bed.log(), [format!("remove {a} 1")]);
        assert_eq!(bed.state(), [format!("{a}={c}")]);
        assert_eq!(bed.apply(), (0, vec![]));
    }
}

#[test]
fn nothing_is_written_when_nothing_differs() {
    let mut bed = Bed::new();
    bed.put("cali40a", "10.0.0.0/8 10.1.2.3/32");
    bed.put("cali60b", "");
    bed.want("cali40a", "10.0.0.0/8 10.1.2.3/32");
    bed.want("cali60b", "");
    let first = bed.sets.write_additions(bed.now);
    assert_eq!((first.writes, first.reads, first.errors.len()), (0, 3, 0));
    assert_eq!(bed.sets.write_removals(bed.now).writes, 0);
    assert_eq!(bed.log().len(), 0);
    assert_eq!(bed.sets.failed_sets().count(), 0);
    // And nothing is read either until the refresh is due.
    assert_eq!(bed.sets.write_additions(bed.now + Duration::from_secs(1)).reads, 0);
    assert_eq!(bed.sets.next_due(), Some((bed.now + Duration::from_secs(90), "set refresh")));
}

#[test]
fn a_new_set_is_made_large_enough_for_its_members() {
    let mut bed = Bed::new();
    let members: String = (0..1500u32).map(|n| format!("10.{}.{}.0/24 ", n / 256, n % 256)).collect();
    bed.want_spec(spec("cali40a", SetKind::Net, 1_048_576), &members);
    bed.want("cali40b", "10.0.0.0/8");
    bed.apply();
    assert_eq!(bed.log(), ["create cali40a 2048", "add cali40a 1500", "create cali40b 1024", "add cali40b 1"]);
}

#[test]
fn sets_of_an_older_agent_go_after_the_tables_and_others_stay() {
    let mut bed = Bed::new();
    for set in ["cali40old", "cali4t7", "felix-4-older", "felix-6x", "cali60old", "foreign", "xcali40"] {
        bed.put(set, "");
    }
    bed.want("cali40a", "10.0.0.0/8");
    bed.sets.write_additions(bed.now);
    assert_eq!(bed.log(), ["create cali40a 1024", "add cali40a 1"]);
    bed.sets.write_removals(bed.now);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8", "foreign=", "xcali40="]);
}

#[test]
fn without_ipv6_its_sets_are_left_alone() {
    let now = Instant::now();
    let kernel = FakeTransport::new(now);
    let options = Options { ipv6: false, largest_set: 8, ..Options::default() };
    let mut bed = Bed { now, sets: IpSets::new(&options, Box::new(kernel.clone())), kernel };
    bed.put("cali60a", "");
    bed.put("cali40a", "");
    bed.apply();
    assert_eq!(bed.state(), ["cali60a="]);
}

#[test]
fn a_set_that_a_rule_names_is_destroyed_once_the_rule_is_gone() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8");
    bed.apply();
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().referenced = true;
    bed.unwant("cali40a");
    // The nft variant lets go of sets late: failures are counted and are no news for a minute.
    bed.sets.write_additions(bed.now);
    assert_eq!(bed.sets.write_removals(bed.now).busy, 1);
    assert_eq!(bed.sets.next_due(), Some((bed.now + Duration::from_millis(2), "set removal")));
    bed.log();
    bed.apply();
    assert_eq!(bed.log().len(), 0, "too early");
    for (seconds, in_use) in [(1, true), (1, true), (1, true), (20, true), (29, true)] {
        bed.now += Duration::from_secs(seconds);
        let report = bed.sets.write_additions(bed.now);
        assert_eq!((report.errors.len(), report.held.len()), (0, 0), "{report:?}");
        assert_eq!(bed.sets.write_removals(bed.now).busy, 1);
        assert_eq!((bed.sets.in_use(), bed.sets.unexplained(bed.now).count()), (in_use, 0));
    }
    bed.now += Duration::from_secs(10);
    assert_eq!(bed.sets.unexplained(bed.now).collect::<Vec<_>>(), [&name("cali40a")]);
    bed.sets.explain(&name("cali40a"), &["rule 1 of INPUT".to_owned()]);
    assert_eq!(bed.sets.unexplained(bed.now).count(), 0, "asked once");
    // Said as long as it lasts, whatever else is written meanwhile.
    bed.want("cali40b", "10.0.0.0/8");
    let report = bed.sets.write_additions(bed.now);
    assert!(report.writes > 0 && report.errors.is_empty(), "{report:?}");
    assert!(report.held[0].contains("cali40a") && report.held[0].contains("rule 1 of INPUT"), "{report:?}");
    bed.unwant("cali40b");
    assert_eq!(bed.apply(), (1, vec![]));
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().referenced = false;
    bed.now += Duration::from_secs(10);
    assert_eq!(bed.apply(), (1, vec![]));
    assert_eq!(bed.state().len(), 0);
    assert!(!bed.sets.in_use());
}

#[test]
fn a_set_wanted_again_before_it_was_destroyed_is_read_and_corrected() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8 11.0.0.0/8");
    bed.apply();
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().referenced = true;
    bed.unwant("cali40a");
    bed.apply();
    bed.want("cali40a", "11.0.0.0/8 12.0.0.0/8");
    assert_eq!(bed.apply(), (2, vec![]));
    assert_eq!(bed.state(), ["cali40a=11.0.0.0/8,12.0.0.0/8"]);
}

#[test]
fn destroying_stops_when_the_time_is_used_up() {
    let mut bed = Bed::new();
    for n in 0..10 {
        bed.put(&format!("cali40x{n}"), "");
    }
    bed.kernel.kernel().destroy_time = Duration::from_millis(4);
    bed.apply();
    assert_eq!(bed.log().len(), 3);
    assert_eq!(bed.sets.next_due(), Some((bed.now, "set removal")));
    for _ in 0..3 {
        bed.apply();
    }
    assert_eq!(bed.state().len(), 0);
    assert_eq!(bed.sets.next_due().unwrap().1, "set refresh");
}

#[test]
fn an_apply_that_keeps_old_members_is_not_called_again_for_removals() {
    let mut bed = Bed::new();
    for n in 0..10 {
        bed.put(&format!("cali40x{n}"), "");
    }
    bed.kernel.kernel().destroy_time = Duration::from_millis(4);
    bed.apply();
    assert_eq!(bed.sets.next_due().unwrap().1, "set removal");
    // The tables failed: the removals are left out.
    bed.sets.write_additions(bed.now);
    assert_eq!(bed.sets.next_due().unwrap().1, "set refresh");
    bed.apply();
    assert_eq!(bed.sets.next_due().unwrap().1, "set removal");
}

#[test]
fn other_limits_and_options_are_corrected_through_a_temporary_set() {
    for odd in [false, true] {
        let mut bed = Bed::new();
        bed.put("cali40a", "10.0.0.0/8");
        bed.put("cali4t0", "");
        {
            let mut kernel = bed.kernel.kernel();
            let set = kernel.sets.get_mut("cali40a").unwrap();
            set.referenced = true;
            set.odd = odd;
            set.max_members = if odd { 100 } else { 5 };
        }
        bed.want("cali40a", "11.0.0.0/8");
        let (_, errors) = bed.apply();
        assert_eq!(errors.len(), 0, "{errors:?}");
        assert_eq!(
            bed.log(),
            ["create cali4t1 1024", "add cali4t1 1", "swap cali40a cali4t1", "destroy cali4t0", "destroy cali4t1"]
        );
        assert_eq!(bed.state(), ["cali40a=11.0.0.0/8"]);
        assert_eq!(bed.kernel.kernel().sets["cali40a"].max_members, 100);
    }
}

#[test]
fn another_type_needs_the_old_set_destroyed_and_fails_while_a_rule_names_it() {
    let mut bed = Bed::new();
    bed.put("cali40a", "10.0.0.0/8");
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().referenced = true;
    let addresses = [Member::Address("10.0.0.1".parse().unwrap())].into();
    let change = SetChange::Replace { spec: spec("cali40a", SetKind::Address, 100), members: addresses };
    bed.sets.want(Family::V4, &name("cali40a"), change);
    let (_, errors) = bed.apply();
    assert!(errors[0].contains("cali40a") && errors[0].contains("another type"), "{errors:?}");
    let failed: Vec<FailedSet> = bed.sets.failed_sets().collect();
    assert!(failed.len() == 1 && failed[0].present && failed[0].reason.contains("in use"), "{failed:?}");
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().referenced = false;
    bed.now += Duration::from_secs(1);
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.1"]);
    assert_eq!(bed.sets.failed_sets().count(), 0);
}

#[test]
fn foreign_changes_are_repaired_at_the_refresh() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8");
    bed.want("cali40b", "10.0.0.0/8");
    bed.apply();
    bed.put("cali40a", "12.0.0.0/8");
    bed.kernel.kernel().sets.remove("cali40b");
    bed.log();
    bed.apply();
    assert_eq!(bed.log().len(), 0);
    bed.now += Duration::from_secs(90);
    bed.apply();
    // What vanished is back; the other has as many members as expected and is found out beside the work.
    assert_eq!(bed.state(), ["cali40a=12.0.0.0/8", "cali40b=10.0.0.0/8"]);
    assert_eq!(bed.sets.next_due(), Some((bed.now, "set removal")));
    bed.apply();
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8", "cali40b=10.0.0.0/8"]);
}

#[test]
fn a_set_wanted_later_is_made_without_reading_again() {
    let mut bed = Bed::new();
    bed.apply();
    bed.want("cali40a", "10.0.0.0/8");
    let report = bed.sets.write_additions(bed.now);
    assert_eq!((report.reads, bed.state()), (0, vec!["cali40a=10.0.0.0/8".to_owned()]));
}

#[test]
fn a_set_that_vanished_is_made_again_when_it_is_found_missing() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8");
    bed.apply();
    bed.kernel.kernel().sets.clear();
    bed.change("cali40a", "11.0.0.0/8", "");
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8,11.0.0.0/8"]);
}

#[test]
fn a_set_that_appeared_is_read_when_it_is_found_there() {
    let mut bed = Bed::new();
    bed.apply();
    bed.put("cali40a", "10.0.0.0/8 12.0.0.0/8");
    bed.want("cali40a", "10.0.0.0/8 11.0.0.0/8");
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8,11.0.0.0/8"]);
}

#[test]
fn networks_of_length_zero_are_refused_and_the_set_is_said_to_be_incomplete() {
    for (set, all, net) in [("cali40a", "0.0.0.0/0", "10.0.0.0/8"), ("cali60a", "::/0", "fd00::/8")] {
        let mut bed = Bed::new();
        bed.want(set, &format!("{all} {net}"));
        let (_, errors) = bed.apply();
        assert!(errors.len() == 1 && errors[0].contains(set), "{errors:?}");
        assert_eq!(bed.state(), [format!("{set}={net}")]);
        assert_eq!(bed.sets.failed_sets().count(), 1);
        assert_eq!(bed.apply(), (0, vec![]), "said once, tried never");
        bed.change(set, "", all);
        assert_eq!(bed.apply(), (0, vec![]));
        assert_eq!(bed.sets.failed_sets().count(), 0);
    }
}

#[test]
fn members_of_the_other_family_are_left_out_silently() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8 fd00::/8");
    bed.change("cali40a", "fd01::/16", "fd00::/8");
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8"]);
}

#[test]
fn a_refused_member_does_not_keep_the_others_out() {
    let mut bed = Bed::new();
    let members = (0..4u8).map(|n| Member::Address([0, 0, 0, n].into())).collect();
    let change = SetChange::Replace { spec: spec("cali40a", SetKind::Address, 100), members };
    bed.sets.want(Family::V4, &name("cali40a"), change);
    bed.want("cali40b", "10.0.0.0/8");
    let (_, errors) = bed.apply();
    assert!(errors.len() == 1 && errors[0].contains("cali40a"), "{errors:?}");
    assert_eq!(bed.state(), ["cali40a=0.0.0.1,0.0.0.2,0.0.0.3", "cali40b=10.0.0.0/8"]);
    assert_eq!(bed.sets.failed_sets().map(|failed| failed.name).collect::<Vec<_>>(), [name("cali40a")]);
}

/// U3.b
#[test]
fn a_set_grows_beside_itself_up_to_the_limit_and_is_too_large_beyond_it() {
    for set in ["cali40a", "cali60a"] {
        let net = |n| if set == "cali40a" { format!("{n}.0.0.0/8 ") } else { format!("fd{n:02}::/16 ") };
        let nets = |numbers: std::ops::Range<u8>| numbers.map(net).collect::<String>();
        let mut bed = Bed::new();
        bed.want_spec(spec(set, SetKind::Net, 2), &nets(10..12));
        bed.apply();
        let temporary = format!("cali{}t0", &set[4..5]);
        assert_eq!(bed.log(), [format!("create {set} 1024"), format!("add {set} 2")]);
        bed.change(set, &nets(12..13), "");
        assert_eq!(bed.apply().1.len(), 0);
        let grown = [
            format!("create {temporary} 1024"),
            format!("add {temporary} 3"),
            format!("swap {set} {temporary}"),
            format!("destroy {temporary}"),
        ];
        assert_eq!(bed.log(), grown);
        assert_eq!(bed.kernel.kernel().sets[set].max_members, 4);
        bed.change(set, &nets(13..14), "");
        bed.apply();
        assert_eq!(bed.log(), [format!("add {set} 1")], "there is room for one more");
        // A successor takes the set as it is.
        let options = Options { largest_set: 8, ..Options::default() };
        bed.sets = IpSets::new(&options, Box::new(bed.kernel.clone()));
        bed.want_spec(spec(set, SetKind::Net, 2), &nets(10..14));
        assert_eq!(bed.apply(), (0, vec![]));

        bed.change(set, &nets(14..20), &nets(10..11));
        let report = bed.sets.write_additions(bed.now);
        let failed: Vec<FailedSet> = bed.sets.failed_sets().collect();
        assert!(failed.len() == 1 && failed[0].too_large && failed[0].present, "{failed:?}");
        assert_eq!(failed[0].reason, "9 members are wanted, 8 are allowed");
        assert!(report.held[0].contains(set) && report.errors.is_empty(), "{report:?}");
    }
}

/// G12
#[test]
fn a_full_set_loses_old_members_before_it_gets_new_ones_if_no_rule_changes() {
    let nets = |numbers: std::ops::Range<u8>| numbers.map(|n| format!("{n}.0.0.0/8 ")).collect::<String>();
    let rebuilt = |members| {
        ["create cali4t0 1024", &format!("add cali4t0 {members}"), "swap cali40a cali4t0", "destroy cali4t0"]
            .map(str::to_owned)
            .to_vec()
    };
    for (rest, added, removed, log) in [
        (true, 30..36, 10..14, vec!["remove cali40a 4".to_owned(), "add cali40a 6".to_owned()]),
        // There is room.
        (true, 30..32, 10..12, vec!["add cali40a 2".to_owned(), "remove cali40a 2".to_owned()]),
        // A rule may still need the old ones.
        (false, 30..36, 10..14, rebuilt(22)),
        // Building it anew is less work.
        (true, 30..40, 10..18, rebuilt(22)),
        // More than there is room for.
        (true, 30..36, 10..10, rebuilt(26)),
    ] {
        let mut bed = Bed::new();
        bed.sets.limit = 100;
        bed.want_spec(spec("cali40a", SetKind::Net, 25), &nets(10..30));
        bed.apply();
        bed.log();
        bed.sets.tables_rest(rest);
        let left: Vec<u8> = (10..30).filter(|n| !removed.contains(n)).chain(added.clone()).collect();
        bed.change("cali40a", &nets(added), &nets(removed));
        let report = bed.sets.write_additions(bed.now);
        assert_eq!((report.errors, bed.sets.failed_sets().count()), (vec![], 0));
        bed.sets.write_removals(bed.now);
        assert_eq!(bed.log(), log);
        let left: Vec<String> = left.iter().map(|n| format!("{n}.0.0.0/8")).collect();
        assert_eq!(bed.state(), [format!("cali40a={}", left.join(","))]);
    }
}

/// U3.b
#[test]
fn beyond_the_limit_nothing_is_written_and_nothing_is_tried_again_until_less_is_wanted() {
    let mut bed = Bed::new();
    let nets = |numbers: std::ops::Range<u8>| numbers.map(|n| format!("{n}.0.0.0/8 ")).collect::<String>();
    bed.want_spec(spec("cali40a", SetKind::Net, 2), &nets(10..19));
    bed.want("cali40b", "10.0.0.0/8");
    assert_eq!(bed.apply(), (2, vec![]));
    assert_eq!(bed.state(), ["cali40b=10.0.0.0/8"]);
    assert_eq!(bed.sets.next_due(), Some((bed.now + Duration::from_secs(90), "set refresh")));
    let failed: Vec<FailedSet> = bed.sets.failed_sets().collect();
    assert!(failed.len() == 1 && failed[0].too_large && !failed[0].present, "{failed:?}");
    assert_eq!(failed[0].reason, "9 members are wanted, 8 are allowed");
    bed.change("cali40a", "", "18.0.0.0/8");
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!((bed.sets.failed_sets().count(), bed.kernel.kernel().sets["cali40a"].members.len()), (0, 8));
}

/// U3.b
#[test]
fn a_large_set_has_room_for_new_members_before_old_ones_go() {
    // members, configured, limit, size
    let cases = [
        (0, 3, 8, Some(3)),
        (3, 3, 8, Some(3)),
        (4, 3, 8, Some(8)),
        (5, 3, 8, Some(8)),
        (7, 8, 8, Some(8)),
        (8, 3, 8, Some(8)),
        (9, 3, 8, None),
        (9, 3, 10, Some(10)),
        (80, 100, 400, Some(100)),
        (81, 100, 400, Some(128)),
        (9, 10, 2, Some(10)),
    ];
    for (count, configured, limit, expected) in cases {
        let mut set = Set::default();
        let members = (0..count).map(|n| Member::Address([10, 0, 0, n].into())).collect();
        set.replace(spec("cali40a", SetKind::Address, configured), members);
        assert_eq!(set.size(limit), expected, "{count} of {configured}, at most {limit}");
    }
}

/// U3.b
#[test]
fn a_set_that_somebody_else_has_filled_is_read_and_rebuilt() {
    let mut bed = Bed::new();
    bed.want_spec(spec("cali40a", SetKind::Net, 2), "10.0.0.0/8");
    bed.apply();
    bed.kernel.kernel().sets.get_mut("cali40a").unwrap().members.extend(nets("99.0.0.0/8"));
    bed.change("cali40a", "11.0.0.0/8", "");
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8,11.0.0.0/8"]);
}

/// U3.e
#[test]
fn one_set_destroyed_or_changed_among_many_is_repaired_without_a_write_to_the_others() {
    for plain in [false, true] {
        let mut bed = Bed::new();
        bed.kernel.kernel().plain = plain;
        for n in 0..2000 {
            bed.want(&format!("cali40s{n}"), "10.0.0.0/8 11.0.0.0/8");
        }
        bed.apply();
        bed.log();
        bed.kernel.kernel().sets.remove("cali40s7");
        bed.kernel.kernel().sets.get_mut("cali40s8").unwrap().members.clear();
        bed.kernel.kernel().sets.get_mut("cali40s9").unwrap().members = nets("10.0.0.0/8 12.0.0.0/8");
        bed.now += Duration::from_secs(90);
        bed.apply();
        if !plain {
            assert_eq!(bed.log(), ["create cali40s7 1024", "add cali40s7 2", "add cali40s8 2"]);
            assert_eq!(bed.sets.next_due(), Some((bed.now, "set removal")));
        }
        bed.apply();
        let log = bed.log();
        assert!(log.contains(&"add cali40s9 1".to_owned()) && log.contains(&"remove cali40s9 1".to_owned()), "{log:?}");
        assert!(
            log.iter().all(|op| ["cali40s7", "cali40s8", "cali40s9"].iter().any(|set| op.contains(set))),
            "{log:?}"
        );
        assert_eq!(bed.apply(), (0, vec![]));
    }
}

#[test]
fn an_interrupted_reading_may_only_add() {
    let mut bed = Bed::new();
    for set in ["cali40a", "cali40b", "cali40c", "cali40d"] {
        bed.put(set, "10.0.0.0/8 11.0.0.0/8 12.0.0.0/8");
    }
    bed.want("cali40a", "10.0.0.0/8 13.0.0.0/8");
    bed.want("cali40b", "13.0.0.0/8");
    bed.kernel.kernel().interrupted = 100;
    let (_, errors) = bed.apply();
    assert!(errors[0].contains("nothing is removed"), "{errors:?}");
    let all = "10.0.0.0/8,11.0.0.0/8,12.0.0.0/8";
    let expected = [
        format!("cali40a={all},13.0.0.0/8"),
        format!("cali40b={all},13.0.0.0/8"),
        format!("cali40c={all}"),
        format!("cali40d={all}"),
    ];
    assert_eq!(bed.state(), expected);
    bed.kernel.kernel().interrupted = 0;
    bed.now = bed.sets.next_due().unwrap().0;
    assert_eq!(bed.apply().1.len(), 0);
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8,13.0.0.0/8", "cali40b=13.0.0.0/8"]);
}

#[test]
fn a_set_that_cannot_be_read_is_rebuilt() {
    let mut bed = Bed::new();
    bed.put("cali40a", "11.0.0.0/8");
    bed.want("cali40a", "10.0.0.0/8");
    bed.kernel.kernel().unreadable.extend(vec![SetError::Other("strange".to_owned()); 4]);
    for _ in 0..6 {
        bed.apply();
        bed.now += Duration::from_secs(1);
    }
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8"]);
    assert!(bed.log().contains(&"swap cali40a cali4t0".to_owned()));
}

#[test]
fn without_an_answer_everything_is_read_again_later() {
    let mut bed = Bed::new();
    bed.want("cali40a", "10.0.0.0/8");
    bed.kernel.kernel().deaf = 1;
    let (writes, errors) = bed.apply();
    assert_eq!((writes, errors.len()), (0, 1));
    assert_eq!(bed.sets.failed_sets().map(|failed| failed.present).collect::<Vec<_>>(), [false]);
    assert_eq!(bed.apply(), (0, vec![]), "not before the pause is over");
    bed.now = bed.sets.next_due().unwrap().0;
    bed.apply();
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8"]);

    bed.change("cali40a", "11.0.0.0/8", "");
    bed.kernel.kernel().deaf = 1;
    assert_eq!(bed.apply().1.len(), 1);
    bed.now = bed.sets.next_due().unwrap().0;
    bed.apply();
    assert_eq!(bed.state(), ["cali40a=10.0.0.0/8,11.0.0.0/8"]);
}

#[derive(Clone, Debug)]
enum Step {
    Want(usize, Vec<u8>, bool),
    Change(usize, Vec<u8>, Vec<u8>),
    Unwant(usize),
    ForeignPut(usize, Vec<u8>, u32),
    ForeignDestroy(usize),
    Reference(usize, bool),
    Distrust,
    Deaf(u32),
    Interrupt(u32),
    Apply,
    Wait(u64),
}

const NAMES: [&str; 4] = ["cali40a", "cali40b", "cali60c", "cali4t0"];

fn steps() -> impl Strategy<Value = Step> {
    let members = || prop::collection::vec(0..6u8, 0..5);
    prop_oneof![
        (0..3usize, members(), any::<bool>()).prop_map(|(set, members, small)| Step::Want(set, members, small)),
        (0..3usize, members(), members()).prop_map(|(set, added, removed)| Step::Change(set, added, removed)),
        (0..3usize).prop_map(Step::Unwant),
        (0..4usize, members(), 4..8u32).prop_map(|(set, members, max)| Step::ForeignPut(set, members, max)),
        (0..4usize).prop_map(Step::ForeignDestroy),
        (0..3usize, any::<bool>()).prop_map(|(set, on)| Step::Reference(set, on)),
        Just(Step::Distrust),
        (1..4u32).prop_map(Step::Deaf),
        (1..8u32).prop_map(Step::Interrupt),
        Just(Step::Apply),
        Just(Step::Apply),
        (0..100u64).prop_map(Step::Wait),
    ]
}

fn some_nets(set: &str, numbers: &[u8]) -> BTreeSet<Member> {
    let text =
        |n: &u8| if family_of(set) == Family::V6 { format!("fd{n:02}::/16") } else { format!("{}.0.0.0/8", n + 10) };
    numbers.iter().map(|n| Member::Net(text(n).parse().unwrap())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any history of wishes, foreign changes and failures ends with the kernel as wanted, and no
    /// apply takes anything out before it has put everything in.
    #[test]
    fn any_history_ends_with_the_kernel_as_wanted(history in prop::collection::vec(steps(), 0..40)) {
        let mut bed = Bed::new();
        bed.put("foreign", "10.0.0.0/8");
        let mut wanted: BTreeMap<&str, BTreeSet<Member>> = BTreeMap::new();
        for step in history {
            match step {
                Step::Want(set, members, small) => {
                    let members = some_nets(NAMES[set], &members);
                    wanted.insert(NAMES[set], members.clone());
                    let spec = spec(NAMES[set], SetKind::Net, if small { 6 } else { 100 });
                    bed.sets.want(spec.family, &spec.name.clone(), SetChange::Replace { spec, members: members.into() });
                }
                Step::Change(set, added, removed) => {
                    if let Some(members) = wanted.get_mut(NAMES[set]) {
                        let (added, removed) = (some_nets(NAMES[set], &added), some_nets(NAMES[set], &removed));
                        let added: BTreeSet<Member> = added.difference(&removed).copied().collect();
                        members.retain(|member| !removed.contains(member));
                        members.extend(added.iter().copied());
                        bed.sets.want(family_of(NAMES[set]), &name(NAMES[set]), SetChange::Delta { added: added.into(), removed: removed.into() });
                    }
                }
                Step::Unwant(set) => {
                    wanted.remove(NAMES[set]);
                    bed.unwant(NAMES[set]);
                }
                Step::ForeignPut(set, members, max) => {
                    let spec = spec(NAMES[set], SetKind::Net, max);
                    let members = some_nets(NAMES[set], &members);
                    let referenced = bed.kernel.kernel().sets.get(NAMES[set]).is_some_and(|set| set.referenced);
                    let set = FakeSet { referenced, ..fake(&spec, &members) };
                    bed.kernel.kernel().sets.insert(spec.name.as_str().to_owned(), set);
                }
                Step::ForeignDestroy(set) => {
                    bed.kernel.kernel().sets.remove(NAMES[set]);
                }
                Step::Reference(set, on) => {
                    if let Some(set) = bed.kernel.kernel().sets.get_mut(NAMES[set]) {
                        set.referenced = on;
                    }
                }
                Step::Distrust => bed.sets.distrust(),
                Step::Deaf(calls) => bed.kernel.kernel().deaf = calls,
                Step::Interrupt(calls) => bed.kernel.kernel().interrupted = calls,
                Step::Apply => {
                    bed.kernel.kernel().log.clear();
                    let reads = bed.sets.read_at.is_none();
                    bed.sets.write_additions(bed.now);
                    let failed: BTreeSet<String> = bed.sets.failed_sets().map(|set| set.name.to_string()).collect();
                    {
                        let kernel = bed.kernel.kernel();
                        let out = kernel.log.iter().any(|op| matches!(op, Op::Remove { .. } | Op::Destroy { .. }));
                        prop_assert!(!out, "something was taken out in the first half");
                    }
                    let read_now = reads && bed.sets.read_at == Some(bed.now);
                    for (set, members) in wanted.iter().filter(|(set, _)| read_now && !failed.contains(**set)) {
                        let kernel = bed.kernel.kernel();
                        prop_assert!(kernel.sets[*set].members.is_superset(members), "{set} is neither filled nor failed");
                    }
                    bed.sets.write_removals(bed.now);
                    if bed.sets.unfinished {
                        // Somebody else's change was found beside the work.
                        bed.apply();
                    }
                    let due = bed.sets.next_due();
                    prop_assert!(due.is_some_and(|(due, _)| due > bed.now), "would be called at once: {due:?}");
                }
                Step::Wait(seconds) => bed.now += Duration::from_secs(seconds),
            }
        }
        {
            let mut kernel = bed.kernel.kernel();
            (kernel.deaf, kernel.interrupted) = (0, 0);
            kernel.sets.values_mut().for_each(|set| set.referenced = false);
        }
        for _ in 0..4 {
            bed.now += Duration::from_secs(100);
            bed.apply();
        }
        let mut expected: Vec<String> = wanted
            .iter()
            .map(|(set, members)| format!("{set}={}", members.iter().map(show).collect::<Vec<_>>().join(",")))
            .collect();
        expected.push("foreign=10.0.0.0/8".to_owned());
        prop_assert_eq!(bed.state(), expected);
        prop_assert_eq!(bed.sets.failed_sets().count(), 0);
        bed.now += Duration::from_secs(1);
        prop_assert_eq!(bed.apply(), (0, vec![]));
    }
    /// Without foreign changes and failures every single apply leaves the kernel as wanted.
    #[test]
    fn undisturbed_the_kernel_is_as_wanted_after_every_apply(history in prop::collection::vec(steps(), 0..60)) {
        let mut bed = Bed::new();
        let mut wanted: BTreeMap<&str, BTreeSet<Member>> = BTreeMap::new();
        for step in history {
            match step {
                Step::Want(set, members, small) => {
                    let members = some_nets(NAMES[set], &members);
                    wanted.insert(NAMES[set], members.clone());
                    let spec = spec(NAMES[set], SetKind::Net, if small { 6 } else { 100 });
                    bed.sets.want(spec.family, &spec.name.clone(), SetChange::Replace { spec, members: members.into() });
                }
                Step::Change(set, added, removed) => {
                    if let Some(members) = wanted.get_mut(NAMES[set]) {
                        let (added, removed) = (some_nets(NAMES[set], &added), some_nets(NAMES[set], &removed));
                        let added: BTreeSet<Member> = added.difference(&removed).copied().collect();
                        members.retain(|member| !removed.contains(member));
                        members.extend(added.iter().copied());
                        bed.sets.want(family_of(NAMES[set]), &name(NAMES[set]), SetChange::Delta { added: added.into(), removed: removed.into() });
                    }
                }
                Step::Unwant(set) => {
                    wanted.remove(NAMES[set]);
                    bed.unwant(NAMES[set]);
                }
                Step::Distrust => bed.sets.distrust(),
                Step::Apply => {
                    prop_assert_eq!(bed.apply().1, Vec::<String>::new());
                    let line = |(set, members): (&&str, &BTreeSet<Member>)| {
                        format!("{set}={}", members.iter().map(show).collect::<Vec<_>>().join(","))
                    };
                    prop_assert_eq!(bed.state(), wanted.iter().map(line).collect::<Vec<_>>());
                }
                Step::Wait(seconds) => bed.now += Duration::from_secs(seconds),
                Step::ForeignPut(..) | Step::ForeignDestroy(_) | Step::Reference(..) | Step::Deaf(_) | Step::Interrupt(_) => (),
            }
        }
    }
}
