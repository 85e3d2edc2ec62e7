//! Many sets at once: joint requests, and sets that are still in use when they should go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Counts what is logged as a warning or worse.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// `count` sets with one member each, which are no longer wanted; the joint requests so far are forgotten.
fn unwanted(count: usize, referenced: bool) -> Bed {
    let mut bed = Bed::new();
    for n in 0..count {
        bed.want(&format!("cali40s{n:04}"), "10.0.0.0/8");
    }
    bed.apply();
    bed.kernel.kernel().sets.values_mut().for_each(|set| set.referenced = referenced);
    for n in 0..count {
        bed.unwant(&format!("cali40s{n:04}"));
    }
    bed.kernel.kernel().sends.clear();
    bed.log();
    bed
}

fn sends(bed: &Bed) -> Vec<usize> {
    std::mem::take(&mut bed.kernel.kernel().sends)
}

/// G4
#[test]
fn one_member_of_many_sets_is_added_by_one_joint_request_and_removed_by_another() {
    let mut bed = Bed::new();
    for n in 0..100 {
        bed.want(&format!("cali40s{n:02}"), "10.0.0.0/8");
    }
    bed.apply();
    sends(&bed);
    for n in 0..100 {
        bed.change(&format!("cali40s{n:02}"), "11.0.0.0/8", "10.0.0.0/8");
    }
    assert_eq!(bed.apply(), (200, vec![]));
    assert_eq!(sends(&bed), [100, 100]);
    assert!(bed.state().iter().all(|set| set.ends_with("=11.0.0.0/8")));
}

#[test]
fn sets_that_fail_do_not_keep_others_waiting_and_go_on_behind_a_refused_member() {
    let mut bed = Bed::new();
    for n in 0..20 {
        bed.want_spec(spec(&format!("cali40s{n:02}"), SetKind::Address, 100), "");
    }
    bed.apply();
    sends(&bed);
    bed.kernel.kernel().sets.remove("cali40s07");
    for n in 0..20 {
        // Every third has one that the kernel refuses.
        let first = if n % 3 == 0 { 0 } else { 1 };
        let added = (first..4u8).map(|last| Member::Address([0, 0, 0, last].into())).collect();
        let change = SetChange::Delta { added, removed: Default::default() };
        bed.sets.want(Family::V4, &name(&format!("cali40s{n:02}")), change);
    }
    let (_, errors) = bed.apply();
    assert_eq!(errors.len(), 7, "{errors:?}");
    // All; the rest of those with a refused member; the set that was gone is made again.
    assert_eq!(sends(&bed), [20, 7, 1]);
    assert!(bed.state().iter().all(|set| set.ends_with("=0.0.0.1,0.0.0.2,0.0.0.3")), "{:?}", bed.state());
    assert_eq!(bed.sets.failed_sets().count(), 7);
}

/// G11
#[test]
fn many_sets_that_nothing_names_go_in_few_joint_requests() {
    let mut bed = unwanted(1000, false);
    assert_eq!(bed.apply(), (1000, vec![]));
    assert_eq!(bed.state().len(), 0);
    let sends = sends(&bed);
    assert!(sends[..3] == [1, 8, 64] && sends.len() < 20 && sends.iter().all(|count| *count <= 64), "{sends:?}");
    assert_eq!(bed.sets.next_due().unwrap().1, "set refresh");
}

/// G11: what the nft variant does for some milliseconds after each commit.
#[test]
fn sets_that_are_all_in_use_cost_one_request_an_attempt_and_go_soon_after_they_can() {
    let mut bed = unwanted(1000, true);
    let begun = bed.now;
    let mut attempts = 0;
    while bed.now < begun + Duration::from_millis(20) {
        bed.apply();
        assert_eq!(sends(&bed), [1], "attempt {attempts}");
        let (due, reason) = bed.sets.next_due().unwrap();
        assert!((1..=3).contains(&(due - bed.now).as_millis()) && reason == "set removal", "{:?}", due - bed.now);
        bed.now = due;
        attempts += 1;
    }
    assert!((8..=11).contains(&attempts), "{attempts}");
    bed.kernel.kernel().sets.values_mut().for_each(|set| set.referenced = false);
    assert_eq!(bed.apply(), (1000, vec![]));
    assert!(sends(&bed).len() < 20 && bed.state().is_empty() && !bed.sets.in_use());
}

#[test]
fn a_set_that_stays_in_use_does_not_keep_others_that_should_go() {
    for stays in ["cali40s0000", "cali40s0500", "cali40s0999"] {
        let mut bed = unwanted(1000, false);
        bed.kernel.kernel().sets.get_mut(stays).unwrap().referenced = true;
        bed.apply();
        bed.now = bed.sets.next_due().unwrap().0;
        bed.apply();
        assert_eq!(bed.state(), [format!("{stays}=10.0.0.0/8")]);
        // A bunch that comes later does not wait for it either, nor for the time that it waits.
        for n in 0..100 {
            bed.want(&format!("cali40t{n}"), "10.0.0.0/8");
        }
        bed.now += Duration::from_secs(20);
        bed.apply();
        for n in 0..100 {
            bed.unwant(&format!("cali40t{n}"));
        }
        bed.now += Duration::from_secs(20);
        bed.apply();
        assert_eq!(bed.state(), [format!("{stays}=10.0.0.0/8")]);
    }
}

#[test]
fn of_many_that_stay_in_use_each_has_its_turn() {
    let mut bed = unwanted(300, true);
    // Only the last can go.
    bed.kernel.kernel().sets.get_mut("cali40s0299").unwrap().referenced = false;
    for _ in 0..400 {
        bed.now = bed.sets.next_due().unwrap().0;
        bed.apply();
    }
    assert_eq!(bed.state().len(), 299);
    assert!(bed.sets.in_use());
}

#[test]
fn a_kernel_that_takes_long_to_destroy_a_set_is_asked_for_one_at_a_time() {
    let mut bed = unwanted(50, false);
    bed.kernel.kernel().destroy_time = Duration::from_millis(40);
    assert_eq!(bed.apply().0, 1);
    assert_eq!(sends(&bed), [1]);
    // A faster one gets as many as fit.
    bed.kernel.kernel().destroy_time = Duration::from_millis(1);
    assert_eq!(bed.apply().0, 10);
    assert_eq!(sends(&bed), [1, 8, 1]);
}

#[test]
fn after_a_lost_answer_it_is_not_said_that_somebody_else_changed_the_sets() {
    for foreign in [false, true] {
        let mut bed = Bed::new();
        for n in 0..10 {
            bed.want(&format!("cali40s{n}"), "10.0.0.0/8");
        }
        bed.apply();
        for n in 0..10 {
            bed.change(&format!("cali40s{n}"), "11.0.0.0/8", "");
        }
        bed.kernel.kernel().deaf_after = Some(4);
        let report = bed.sets.write_additions(bed.now);
        assert_eq!((report.writes, report.errors.len()), (4, 1), "{report:?}");
        // What became of the others is unknown: one of them was written.
        bed.kernel.kernel().sets.get_mut("cali40s7").unwrap().members.extend(nets("11.0.0.0/8"));
        bed.kernel.kernel().deaf_after = None;
        let warnings = Warnings::default();
        tracing::subscriber::with_default(warnings.clone(), || {
            bed.now = bed.sets.next_due().unwrap().0;
            assert_eq!(bed.apply(), (5, vec![]));
            if foreign {
                bed.kernel.kernel().sets.get_mut("cali40s7").unwrap().members.clear();
                bed.sets.distrust();
                assert_eq!(bed.apply(), (1, vec![]));
            }
        });
        assert_eq!(warnings.0.load(Ordering::Relaxed), usize::from(foreign));
        assert!(bed.state().iter().all(|set| set.ends_with("=10.0.0.0/8,11.0.0.0/8")));
    }
}
