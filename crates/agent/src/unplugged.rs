//! Endpoints of this host whose interface does not exist: machines that were never plugged in, or unplugged and not
//! deleted (users.md U7.c).
//!
//! Fed by the main loop with the updates that pass by it on their way to the graph, and with the time; says of each
//! endpoint once, when its interface has been absent for long, that it is in the datastore and has none.
//!
//! Law: *without = { endpoint of this host | there is no interface of its name }*, each with the moment since which
//! that is so; what happened before all facts were known counts from then on.
//!
//! Invariant: however many there are, a report is at most [`MOST`] lines, and the next one comes a tenth of the limit
//! later at the earliest. What is remembered is bounded by the number of objects (I7).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use model::{Name, WorkloadEndpointKey};
use tracing::info;

/// How long an interface may be absent before that is worth a line (U7.c).
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// If more endpoints than this are to be reported at once, one line stands for all.
const MOST: usize = 20;

/// How many of those one line names.
const EXAMPLES: usize = 3;

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Unplugged {
    limit: Duration,
    /// All facts are known.
    begun: bool,
    /// The interface of each endpoint of this host.
    endpoints: BTreeMap<WorkloadEndpointKey, Name>,
    by_interface: BTreeMap<Name, BTreeSet<WorkloadEndpointKey>>,
    /// The interfaces that exist.
    links: BTreeSet<Name>,
    /// Those without an interface, and since when.
    without: BTreeMap<WorkloadEndpointKey, Instant>,
    /// Those of them that were not reported, in the order of time.
    unreported: BTreeSet<(Instant, WorkloadEndpointKey)>,
    quiet_until: Option<Instant>,
}

/// What there is to say, for the log and for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Endpoints of this host whose interface does not exist.
    pub(crate) without_interface: usize,
    /// Those of them for longer than the limit, of which it was said.
    pub(crate) reported: usize,
    /// How long the first of them has been without.
    pub(crate) oldest: Option<Duration>,
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
enum News {
    One {
        key: WorkloadEndpointKey,
        interface: Name,
        age: Duration,
    },
    /// Too many to name all of them.
    Many {
        count: usize,
        examples: String,
        /// Of the oldest.
        age: Duration,
    },
}

impl Unplugged {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            begun: false,
            endpoints: BTreeMap::new(),
            by_interface: BTreeMap::new(),
            links: BTreeSet::new(),
            without: BTreeMap::new(),
            unreported: BTreeSet::new(),
            quiet_until: None,
        }
    }

    /// All facts are known: what is absent now has been so since now. Calls after the first do nothing.
    pub(crate) fn begin(&mut self, now: Instant) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        self.without.values_mut().for_each(|since| *since = now);
        self.unreported = self.without.iter().map(|(key, since)| (*since, key.clone())).collect();
    }

    /// Takes an endpoint of this host with the name of its interface; `None` if the endpoint is gone.
    pub(crate) fn on_endpoint(&mut self, key: &WorkloadEndpointKey, interface: Option<&Name>, now: Instant) {
        if self.endpoints.get(key) == interface {
            return;
        }
        if let Some(old) = self.endpoints.remove(key)
            && let Some(keys) = self.by_interface.get_mut(&old)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.by_interface.remove(&old);
            }
        }
        self.forget(key);
        let Some(interface) = interface else { return };
        self.endpoints.insert(key.clone(), Name::clone(interface));
        self.by_interface.entry(Name::clone(interface)).or_default().insert(key.clone());
        if !self.links.contains(interface) {
            self.remember(key, now);
        }
    }

    /// Takes that an interface exists, or that it does not.
    pub(crate) fn on_link(&mut self, name: &Name, exists: bool, now: Instant) {
        let changed = if exists { self.links.insert(Name::clone(name)) } else { self.links.remove(name) };
        if !changed {
            return;
        }
        for key in self.by_interface.get(name).cloned().unwrap_or_default() {
            if exists {
                self.forget(&key);
            } else {
                self.remember(&key, now);
            }
        }
    }

    fn remember(&mut self, key: &WorkloadEndpointKey, now: Instant) {
        self.without.insert(key.clone(), now);
        self.unreported.insert((now, key.clone()));
    }

    fn forget(&mut self, key: &WorkloadEndpointKey) {
        if let Some(since) = self.without.remove(key) {
            self.unreported.remove(&(since, key.clone()));
        }
    }

    /// When the next report is due, if nothing changes.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let (since, _) = self.unreported.first().filter(|_| self.begun)?;
        let due = *since + self.limit;
        Some(self.quiet_until.map_or(due, |until| until.max(due)))
    }

    /// Says of those that are due that they have no interface.
    pub(crate) fn report(&mut self, now: Instant) {
        let news = self.news(now);
        let Figures { without_interface, reported, .. } = self.figures(now);
        for news in news {
            match news {
                News::One { key, interface, age } => {
                    info!(%key, %interface, ?age, reported, "in datastore, no interface")
                }
                News::Many { count, examples, age } => {
                    info!(count, examples, oldest = ?age, reported, without_interface, "in datastore, no interface");
                }
            }
        }
    }

    fn news(&mut self, now: Instant) -> Vec<News> {
        let due = self.take_due(now);
        if due.len() > MOST {
            let examples: Vec<String> = due.iter().take(EXAMPLES).map(|(key, _)| key.to_string()).collect();
            let (count, age) = (due.len(), due.first().map(|(_, age)| *age).unwrap_or_default());
            return vec![News::Many { count, examples: examples.join(" "), age }];
        }
        let one = |(key, age)| {
            let interface = self.endpoints.get(&key).cloned().unwrap_or_default();
            News::One { key, interface, age }
        };
        due.into_iter().map(one).collect()
    }

    /// Returns those that are due, the oldest first, and how old each is; they count as reported.
    fn take_due(&mut self, now: Instant) -> Vec<(WorkloadEndpointKey, Duration)> {
        if self.next_due().is_none_or(|due| due > now) {
            return Vec::new();
        }
        let mut due = Vec::new();
        while let Some((since, _)) = self.unreported.first()
            && *since + self.limit <= now
            && let Some((since, key)) = self.unreported.pop_first()
        {
            // To the second: a reader wants to know since when.
            let age = Duration::from_secs(now.saturating_duration_since(since).as_secs());
            due.push((key, age));
        }
        self.quiet_until = Some(now + self.limit / 10);
        due
    }

    /// Counts them.
    pub(crate) fn figures(&self, now: Instant) -> Figures {
        Figures {
            without_interface: self.without.len(),
            reported: self.without.len() - self.unreported.len(),
            oldest: self.without.values().min().map(|since| now.saturating_duration_since(*since)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60;

    fn key(name: &str) -> WorkloadEndpointKey {
        WorkloadEndpointKey {
            host: "h1".into(),
            orchestrator: "openstack".into(),
            workload: "openstack/w".into(),
            endpoint: name.into(),
        }
    }

    /// Runs a script of `minute action name` and returns what was reported, with the minute and the age in minutes.
    /// Endpoint `a` has interface `tap-a`, and so has `a'`.
    fn run(script: &str) -> Vec<String> {
        let start = Instant::now();
        let mut unplugged = Unplugged::new(LIMIT);
        let mut said = Vec::new();
        let mut steps: Vec<(u64, &str, &str)> = Vec::new();
        for step in script.split("; ") {
            let words: Vec<&str> = step.split(' ').collect();
            steps.push((words[0].parse().unwrap(), words[1], words.get(2).copied().unwrap_or_default()));
        }
        for minute in 0..=60 {
            let now = start + Duration::from_secs(minute * MINUTE);
            for (_, action, name) in steps.iter().filter(|(at, _, _)| *at == minute) {
                let interface = |name: &str| Name::from(format!("tap-{}", name.trim_end_matches('\'')).as_str());
                match *action {
                    "begin" => unplugged.begin(now),
                    "put" => unplugged.on_endpoint(&key(name), Some(&interface(name)), now),
                    "move" => unplugged.on_endpoint(&key(name), Some(&"tap-elsewhere".into()), now),
                    "delete" => unplugged.on_endpoint(&key(name), None, now),
                    "plug" => unplugged.on_link(&interface(name), true, now),
                    "unplug" => unplugged.on_link(&interface(name), false, now),
                    other => panic!("{other}"),
                }
            }
            for (key, age) in unplugged.take_due(now) {
                said.push(format!("{minute} {} {}", key.endpoint, age.as_secs() / MINUTE));
            }
        }
        said
    }

    /// U7.c.
    #[test]
    fn an_endpoint_is_reported_once_when_its_interface_has_been_absent_for_ten_minutes() {
        let cases: &[(&str, &str, &[&str])] = &[
            ("never there", "0 begin; 5 put a", &["15 a 10"]),
            ("there all the time", "0 begin; 0 plug a; 5 put a", &[]),
            ("written again without a change", "0 begin; 5 put a; 9 put a; 30 put a", &["15 a 10"]),
            ("comes in time", "0 begin; 5 put a; 14 plug a", &[]),
            ("comes, and goes for good", "0 begin; 5 put a; 9 plug a; 12 unplug a", &["22 a 10"]),
            (
                "comes after the report and goes again",
                "0 begin; 0 put a; 11 plug a; 12 unplug a",
                &["10 a 10", "22 a 10"],
            ),
            ("flaps", "0 begin; 0 put a; 9 plug a; 9 unplug a; 18 plug a; 18 unplug a; 27 plug a", &[]),
            ("deleted in time", "0 begin; 0 put a; 9 delete a", &[]),
            ("deleted and made anew", "0 begin; 0 put a; 9 delete a; 9 put a", &["19 a 10"]),
            (
                "deleted after the report and made anew",
                "0 begin; 0 put a; 12 delete a; 13 put a",
                &["10 a 10", "23 a 10"],
            ),
            ("gets another interface", "0 begin; 0 put a; 9 move a", &["19 a 10"]),
            ("gets one that is there", "0 begin; 0 put a; 9 plug elsewhere; 9 move a", &[]),
            ("had one that stays without owner", "0 begin; 0 plug a; 0 put a; 1 move a; 2 unplug a", &["11 a 10"]),
            ("two of one interface", "0 begin; 0 plug a; 0 put a; 0 put a'; 3 unplug a", &["13 a 10", "13 a' 10"]),
            ("what was before the facts were known", "0 put a; 20 begin", &["30 a 10"]),
            ("as long as the facts are not known", "0 put a", &[]),
            ("within a minute after another one", "0 begin; 0 put a; 1 put b", &["10 a 10", "11 b 10"]),
        ];
        for (name, script, expected) in cases {
            assert_eq!(run(script), *expected, "{name}");
        }
    }

    #[test]
    fn reports_are_a_tenth_of_the_limit_apart_and_the_figures_count_what_was_said() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut unplugged = Unplugged::new(LIMIT);
        unplugged.begin(start);
        assert_eq!(unplugged.next_due(), None);
        for second in 0..100 {
            unplugged.on_endpoint(&key(&format!("e{second:03}")), Some(&"tap".into()), at(second));
        }
        assert_eq!(unplugged.next_due(), Some(at(600)));
        assert_eq!(unplugged.take_due(at(599)).len(), 0);
        assert_eq!(unplugged.take_due(at(600)).len(), 1);
        assert_eq!(unplugged.next_due(), Some(at(660)), "one line a second is too many");
        let of = |unplugged: &Unplugged, second| {
            let Figures { without_interface, reported, oldest } = unplugged.figures(at(second));
            (without_interface, reported, oldest.map(|age| age.as_secs()))
        };
        assert_eq!(of(&unplugged, 650), (100, 1, Some(650)));
        assert_eq!(unplugged.take_due(at(660)).len(), 60);
        assert_eq!(of(&unplugged, 660), (100, 61, Some(660)));
        unplugged.on_endpoint(&key("e000"), None, at(661));
        assert_eq!(of(&unplugged, 661), (99, 60, Some(660)));
        unplugged.on_link(&"tap".into(), true, at(662));
        assert_eq!(of(&unplugged, 662), (0, 0, None));
        assert_eq!(unplugged.next_due(), None);
    }

    /// U7.c, however many there are.
    #[test]
    fn ten_thousand_endpoints_without_an_interface_are_one_line_and_never_more_than_twenty_a_minute() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut unplugged = Unplugged::new(LIMIT);
        for number in 0..10_000 {
            unplugged.on_endpoint(&key(&format!("e{number:04}")), Some(&"tap".into()), start);
        }
        unplugged.begin(start);
        let name = |number| format!("h1/openstack/openstack/w/e{number:04}");
        let examples = [name(0), name(1), name(2)].join(" ");
        assert_eq!(unplugged.news(at(600)), [News::Many { count: 10_000, examples, age: LIMIT }]);

        // Two every five seconds, for an hour.
        let mut lines = [0; 200];
        for second in 601..7200 {
            if second < 4200 && second % 5 == 0 {
                for number in [2 * second, 2 * second + 1] {
                    unplugged.on_endpoint(&key(&format!("f{number}")), Some(&"tap".into()), at(second));
                }
            }
            lines[usize::try_from(second / 60).unwrap()] += unplugged.news(at(second)).len();
        }
        assert!(lines.iter().all(|lines| *lines <= MOST), "{lines:?}");
        assert_eq!(unplugged.figures(at(7200)).reported, 10_000 + 2 * 719);
    }

    #[test]
    fn when_all_has_gone_nothing_is_remembered() {
        let now = Instant::now();
        let mut unplugged = Unplugged::new(LIMIT);
        for round in 0..3 {
            for number in 0..100 {
                let interface = Name::from(format!("tap{}", number % 7).as_str());
                unplugged.on_endpoint(&key(&number.to_string()), Some(&interface), now);
                unplugged.on_link(&interface, (number + round) % 2 == 0, now);
            }
            unplugged.begin(now);
            for number in 0..100 {
                unplugged.on_endpoint(&key(&number.to_string()), None, now);
                unplugged.on_link(&Name::from(format!("tap{}", number % 7).as_str()), false, now);
            }
            let Unplugged { limit: _, begun: _, endpoints, by_interface, links, without, unreported, quiet_until: _ } =
                &unplugged;
            assert!(endpoints.is_empty() && by_interface.is_empty() && links.is_empty(), "{unplugged:?}");
            assert!(without.is_empty() && unreported.is_empty(), "{unplugged:?}");
        }
    }
}
