//! Others at work on our tables: what is noticed, how soon it is put right, and what is left alone. Against real
//! kernels and tools, each test in a network namespace of its own, for both variants and families.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and says in which case it was")]

mod host;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dataplane::{ApplyLoop, Options, Report, Variant};
use program::{Changes, Family, Member, SetChange, SetKind, SetName, SetSpec};
use testkit::netns::in_new_netns;

use host::{Host, LIMIT, Log, assert_sound, changed_policy, program};

fn every_host(test: impl Fn(Host) + Sync) {
    for variant in [Variant::Legacy, Variant::Nft] {
        for family in Family::BOTH {
            let host = Host { variant, family };
            println!("{host:?}");
            in_new_netns(|| test(host));
        }
    }
}

macro_rules! needs_tables {
    () => {
        testkit::kernel_test!(
            "iptables-legacy-restore",
            "iptables-nft-restore",
            "ip6tables-legacy-restore",
            "ip6tables-nft-restore",
            "nft",
            "flock"
        );
    };
}

/// An apply loop that is driven as the agent does it.
struct Watched {
    runtime: tokio::runtime::Runtime,
    apply: ApplyLoop,
    /// Why applies ran that no batch asked for.
    reasons: Vec<&'static str>,
}

impl Watched {
    /// With everything in force.
    fn new(host: Host, changes: Changes, options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let options = Options { variant: Some(host.variant), ipv6: host.family == Family::V6, ..options };
        let mut watched = Self { runtime, apply: ApplyLoop::new(options), reasons: Vec::new() };
        assert_sound(&watched.apply(changes));
        assert_eq!(watched.watch(Duration::from_millis(1)).map(|report| report.writes()), None);
        watched
    }

    fn apply(&mut self, changes: Changes) -> Report {
        self.runtime.block_on(self.apply.apply(changes))
    }

    /// Watches for a time; applies and returns if there is something to do.
    fn watch(&mut self, time: Duration) -> Option<Report> {
        let Self { runtime, apply, reasons } = self;
        runtime.block_on(async {
            let reason = tokio::time::timeout(time, apply.disturbed()).await.ok()?;
            reasons.push(reason);
            Some(apply.apply(Changes::default()).await)
        })
    }

    /// Watches and applies until the table is as it was; returns how long that took, and the reports.
    fn until_right(&mut self, host: Host, good: &str) -> (Duration, Vec<Report>) {
        let start = Instant::now();
        let mut reports = Vec::new();
        loop {
            reports.extend(self.watch(Duration::from_secs(1)));
            if rules(host, "filter") == good {
                return (start.elapsed(), reports);
            }
            assert!(start.elapsed() < LIMIT, "{reports:?}\n{}", rules(host, "filter"));
        }
    }
}

/// A table without times and counters.
fn rules(host: Host, table: &str) -> String {
    let listing = host.listing(table);
    let plain = listing.lines().filter(|line| !line.starts_with('#'));
    plain.map(|line| format!("{}\n", line.split(" [").next().unwrap_or_default())).collect()
}

/// The time that the machine needs for a write by a program, times a lot.
fn generous(host: Host) -> Duration {
    let start = Instant::now();
    host.restore("*filter\n:X-floor - -\nCOMMIT\n");
    host.restore("*filter\n-X X-floor\nCOMMIT\n");
    start.elapsed() * 5
}

/// K2: repaired within a second, in one transaction, and with the rival's name where the kernel tells it.
#[test]
fn a_foreign_change_of_one_chain_is_repaired_at_once() {
    needs_tables!();
    every_host(|host| {
        let log = Log::default();
        log.while_doing(|| {
            let mut agent = Watched::new(host, program(host, 3), Options::default());
            let good = rules(host, "filter");
            let damages = [
                "*filter\n-D cali-pi-0 2\nCOMMIT\n",
                "*filter\n-I cali-pi-0 2 -j ACCEPT\nCOMMIT\n",
                "*filter\n:cali-pi-1 - -\nCOMMIT\n",
                "*filter\n-I FORWARD -m comment --comment \"cali:CCCCCCCCCCCCCCCC\" -j ACCEPT\nCOMMIT\n",
                "*filter\n:cali-new - -\n-A cali-new -j DROP\nCOMMIT\n",
                "*filter\n-D FORWARD 1\nCOMMIT\n",
                "*filter\n-F\nCOMMIT\n",
            ];
            for damage in damages {
                let allowed = Duration::from_secs(1) + generous(host);
                agent.watch(Duration::from_millis(1));
                host.restore(damage);
                let (took, reports) = agent.until_right(host, &good);
                assert!(took < allowed, "{took:?} {damage}");
                assert_eq!(reports.iter().map(Report::writes).sum::<u64>(), 1, "{damage} {reports:?}");
                assert_sound(reports.last().unwrap());
            }
        });
        assert!(
            log.count("foreign changes found", "table=\"filter").max(log.count("foreign changes found", "filter/"))
                >= 7,
            "{}",
            log.text()
        );
        if host.variant == Variant::Nft {
            assert_eq!(log.count("foreign changes found", "tables-nft"), 7, "{}", log.text());
        }
    });
}

/// U15.e: nothing of ours is written when others change what is theirs, and no foreign rule is moved.
#[test]
fn foreign_rules_in_shared_chains_are_left_alone() {
    needs_tables!();
    every_host(|host| {
        let mut agent = Watched::new(host, program(host, 2), Options::default());
        let theirs = [
            "*filter\n:DOCKER - -\n-A INPUT -j DOCKER\n-A DOCKER -p 6 -j ACCEPT\nCOMMIT\n",
            "*filter\n-I FORWARD 2 -p 17 -j DOCKER\nCOMMIT\n",
            "*filter\n-D FORWARD 2\nCOMMIT\n",
            "*nat\n:KUBE - -\n-A KUBE -j RETURN\n-A PREROUTING -j KUBE\nCOMMIT\n",
        ];
        for change in theirs {
            host.restore(change);
            let reports: Vec<_> = std::iter::from_fn(|| agent.watch(Duration::from_millis(700))).collect();
            assert_eq!(reports.iter().map(Report::writes).sum::<u64>(), 0, "{change} {reports:?}");
        }
        let before = rules(host, "filter");
        assert_sound(&agent.apply(changed_policy(host, 0)));
        let foreign = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("cali"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(foreign(&rules(host, "filter")), foreign(&before));
    });
}

/// The size of the table tells nothing of this; what else is there is the refresh. Most refreshes make do with a proof
/// that nothing has changed, which must not hold here.
#[test]
fn a_replacement_of_the_same_size_is_found_by_the_refresh() {
    needs_tables!();
    every_host(|host| {
        let options = Options {
            table_refresh: Some(Duration::from_millis(400)),
            post_write_check: Duration::from_millis(50),
            ..Options::default()
        };
        let mut agent = Watched::new(host, program(host, 2), options);
        let good = rules(host, "filter");
        for number in 1..4 {
            // Some refreshes, and others at work elsewhere.
            assert!(agent.watch(Duration::from_millis(1_500)).is_none(), "{:?}", agent.reasons);
            host.nft(&format!("add table inet elsewhere{number}\n"));
            agent.reasons.clear();
            let replaced = "*filter\n-R cali-pi-0 1 -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j MARK --set-mark 0x20000/0x20000\nCOMMIT\n";
            host.restore(replaced);
            let (_, reports) = agent.until_right(host, &good);
            assert_eq!(reports.iter().map(Report::writes).sum::<u64>(), 1, "{reports:?}");
            let by_refresh = agent.reasons.iter().any(|reason| reason.contains("found by the refresh"));
            assert_eq!(by_refresh, host.variant == Variant::Legacy, "{:?}", agent.reasons);
        }
    });
}

/// U5.a, the mechanism: the batch does not wait for the read, the read takes nothing along, and it comes again.
#[test]
fn a_batch_breaks_a_refresh_off_and_finds_nothing_to_read() {
    needs_tables!();
    every_host(|host| {
        let refresh = Duration::from_millis(400);
        let options = Options { table_refresh: Some(refresh), ..Options::default() };
        let mut agent = Watched::new(host, program(host, 1_000), options);
        for number in 0..5 {
            // In the middle of a listing, most times.
            assert!(agent.watch(refresh + Duration::from_millis(5)).is_none());
            let report = agent.apply(changed_policy(host, number));
            assert_sound(&report);
            assert_eq!(report.writes(), 1, "{report:?}");
            assert!(report.drivers.iter().all(|driver| !driver.driver.starts_with("filter") || driver.reads == 0));
        }
        let good = rules(host, "filter");
        if host.variant == Variant::Legacy {
            let replaced = "*filter\n-R cali-pi-20 1 -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j MARK --set-mark 0x20000/0x20000\nCOMMIT\n";
            host.restore(replaced);
            agent.until_right(host, &good);
        }
        assert_eq!(saves_running(), 0);
    });
}

/// Save programs in the network namespace of this thread, after those that were killed had a moment.
fn saves_running() -> usize {
    std::thread::sleep(Duration::from_millis(300));
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let processes =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let saves = processes.filter(|pid| pid.parse::<u32>().is_ok()).filter(|pid| {
        // `comm` would be cut before the word.
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let program = line.split('\0').next().unwrap_or_default();
        let namespace = std::fs::read_link(format!("/proc/{pid}/ns/net"));
        program.contains("tables") && program.ends_with("-save") && namespace.is_ok_and(|netns| netns == here)
    });
    saves.count()
}

/// U15.a.
#[test]
fn whoever_keeps_displacing_our_rules_is_named_once_and_answered_once_per_refresh() {
    needs_tables!();
    every_host(|host| {
        let log = Log::default();
        log.while_doing(|| {
            let mut agent = Watched::new(host, program(host, 2), Options::default());
            let good = rules(host, "filter");
            let rival = "*filter\n-I FORWARD -s RIVAL -j ACCEPT\nCOMMIT\n";
            let address = if host.family == Family::V4 { "192.0.2.7" } else { "2001:db8::7" };
            let rival = rival.replace("RIVAL", address);
            for _ in 0..2 {
                host.restore(&rival);
                let start = Instant::now();
                while !rules(host, "filter").contains("-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\"")
                    || first_rule(host).contains(address)
                {
                    agent.watch(Duration::from_secs(1));
                    assert!(start.elapsed() < LIMIT);
                }
            }
            for _ in 0..3 {
                host.restore(&rival);
                while let Some(report) = agent.watch(Duration::from_millis(800)) {
                    assert_eq!(report.writes(), 0, "{report:?}");
                    let fighting: Vec<_> = report.drivers.iter().flat_map(|driver| &driver.fighting).collect();
                    assert_eq!(fighting, ["FORWARD"], "{report:?}");
                }
            }
            assert!(first_rule(host).contains(address));
            // Other work goes on meanwhile.
            assert_eq!(agent.apply(changed_policy(host, 1)).writes(), 1);
            assert_ne!(rules(host, "filter"), good);
        });
        assert_eq!(log.count("keeps displacing our rules; ", "FORWARD"), 1, "{}", log.text());
        let address = if host.family == Family::V4 { "192.0.2.7/32" } else { "2001:db8::7/128" };
        assert_eq!(log.count("keeps displacing our rules; ", address), 1, "{}", log.text());
        if host.variant == Variant::Nft {
            assert_eq!(log.count("keeps displacing our rules; ", "tables-nft"), 1, "{}", log.text());
        }
    });
}

fn first_rule(host: Host) -> String {
    let rules = rules(host, "filter");
    rules.lines().find(|line| line.starts_with("-A FORWARD")).unwrap_or_default().to_owned()
}

/// Somebody who holds a lock file.
struct Adversary(Child);

impl Adversary {
    fn holding(path: &std::path::Path, seconds: &str) -> Self {
        let mut command = Command::new("flock");
        let child = command.arg("--no-fork").arg(path).args(["sleep", seconds]).stdin(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while std::fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap_or_default().trim() != "sleep" {
            assert!(start.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Adversary {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// U2.a and K3: one warning per episode; sets of later batches do not wait; the change goes in when the lock is free.
#[test]
fn a_lock_that_others_hold_is_named_once_and_nothing_else_waits_for_it() {
    needs_tables!();
    for family in Family::BOTH {
        in_new_netns(|| {
            let host = Host { variant: Variant::Legacy, family };
            let directory = tempfile::tempdir().unwrap();
            let lock = directory.path().join("xtables.lock");
            let log = Log::default();
            log.while_doing(|| {
                let options = Options { lock_file: lock.clone(), ..Options::default() };
                let mut agent = Watched::new(host, program(host, 2), options);
                let before = rules(host, "filter");
                let adversary = Adversary::holding(&lock, "4");
                let start = Instant::now();
                let report = agent.apply(changed_policy(host, 0));
                assert!(report.drivers.iter().any(|driver| driver.waiting.is_some()), "{report:?}");
                assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
                assert_eq!(rules(host, "filter"), before);

                // The program of the family waits; a set and another change of a chain come meanwhile.
                let name = format!("cali{}0s:one", family.digit());
                let mut changes = changed_policy(host, 1);
                let spec =
                    SetSpec { name: SetName::new(&name).unwrap(), family, kind: SetKind::Address, max_members: 64 };
                let member = if family == Family::V4 { "10.0.0.1" } else { "fd00::1" };
                let members = [Member::Address(member.parse().unwrap())].into_iter().collect();
                changes.sets.insert((family, spec.name.clone()), SetChange::Replace { spec, members });
                let second = Instant::now();
                agent.apply(changes);
                println!("set written after {:?}", second.elapsed());
                let sets = Command::new("ipset").args(["list", "-name"]).output().unwrap();
                assert!(String::from_utf8(sets.stdout).unwrap().contains(&name));
                assert_eq!(rules(host, "filter"), before, "the lock is still held");

                let mut last = None;
                while rules(host, "filter") == before || last.as_ref().is_none_or(Report::failed) {
                    last = agent.watch(Duration::from_secs(1)).or(last);
                    assert!(start.elapsed() < LIMIT, "{last:?}");
                }
                println!("in force after {:?}", start.elapsed());
                let after = rules(host, "filter");
                for number in 0..2 {
                    let chain = format!("-A cali-pi-{number} ");
                    let lines: Vec<_> = after.lines().filter(|line| line.starts_with(&chain)).collect();
                    assert!(lines.len() == 2 && lines[0].ends_with("-j DROP"), "{after}");
                }
                drop(adversary);
            });
            assert_eq!(log.count("xtables_lock_wait", "sleep"), 1, "{}", log.text());
            assert_eq!(log.count("xtables_lock_acquired", "waited_ms"), 1, "{}", log.text());
        });
    }
}
