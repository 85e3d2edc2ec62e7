//! From link messages to what consumers are told: damping, renames, names held twice (host.md 2.2, 2.3).
//!
//! Fed by the [monitor](super) with messages, lists and the passing of time; feeds it [`LinkEvent`]s. Pure.
//!
//! Invariants: per name the events alternate between a state and its end, and a state of another index
//! only ever follows the end of the former; a name that two indexes hold is not reported on until one is
//! left; an interface that came up, or may have been down unseen, has a higher generation than before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use model::{LinkState, Name};

use super::LinkEvent;

/// How long bad news is held back: what comes right again in between is then reported in one go.
const DAMPING: Duration = Duration::from_millis(100);

/// What a message or list says about an index; `None`: it is gone.
pub(super) type Seen = Option<(Name, bool)>;

#[derive(Debug)]
struct Link {
    name: Name,
    up: bool,
    generation: u32,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(super) struct Tracker {
    /// What is known, after damping.
    links: BTreeMap<u32, Link>,
    holders: BTreeMap<Name, BTreeSet<u32>>,
    /// What consumers were told last.
    reported: BTreeMap<Name, LinkState>,
    /// Held back, per index in order of arrival, with the time from which each may pass.
    queues: BTreeMap<u32, VecDeque<(Instant, Seen)>>,
    generation: u32,
}

impl Tracker {
    /// Takes one message.
    pub(super) fn see(&mut self, now: Instant, index: u32, seen: Seen, out: &mut Vec<LinkEvent>) {
        let good = matches!(&seen, Some((_, true))) || self.latest(index).is_none();
        let waiting = self.queues.get(&index).is_some_and(|queue| !queue.is_empty());
        if good && !waiting {
            self.pass(index, seen, out);
        } else {
            let ready = if good { now } else { now + DAMPING };
            self.queues.entry(index).or_default().push_back((ready, seen));
        }
    }

    /// Takes a complete list. `doubtful`: messages before it were lost, so that every interface may have
    /// been down in between.
    pub(super) fn list(
        &mut self,
        now: Instant,
        list: Vec<(u32, Name, bool)>,
        doubtful: bool,
        out: &mut Vec<LinkEvent>,
    ) {
        let present: BTreeSet<u32> = list.iter().map(|(index, ..)| *index).collect();
        let known: BTreeSet<u32> = self.links.keys().chain(self.queues.keys()).copied().collect();
        for index in known.difference(&present) {
            if self.latest(*index).is_some() {
                self.see(now, *index, None, out);
            }
        }
        for (index, name, up) in list {
            if self.latest(index) != Some((&name, up)) {
                self.see(now, index, Some((name, up)), out);
            } else if doubtful
                && up
                && let Some(link) = self.links.get_mut(&index).filter(|link| link.up)
            {
                self.generation += 1;
                link.generation = self.generation;
                let name = Name::clone(&link.name);
                self.settle(&name, out);
            }
        }
    }

    /// Lets through what has been held back long enough.
    pub(super) fn tick(&mut self, now: Instant, out: &mut Vec<LinkEvent>) {
        let indexes: Vec<u32> = self.queues.keys().copied().collect();
        for index in indexes {
            while let Some(queue) = self.queues.get_mut(&index)
                && queue.front().is_some_and(|(ready, _)| *ready <= now)
                && let Some((_, seen)) = queue.pop_front()
            {
                self.pass(index, seen, out);
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
    }

    /// When [`Self::tick`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.queues.values().filter_map(|queue| queue.front()).map(|(ready, _)| *ready).min()
    }

    /// The last thing seen of an index, held back or not.
    fn latest(&self, index: u32) -> Option<(&Name, bool)> {
        match self.queues.get(&index).and_then(|queue| queue.back()) {
            Some((_, seen)) => seen.as_ref().map(|(name, up)| (name, *up)),
            None => self.links.get(&index).map(|link| (&link.name, link.up)),
        }
    }

    /// Takes over what was seen and reports what follows from it.
    fn pass(&mut self, index: u32, seen: Seen, out: &mut Vec<LinkEvent>) {
        let renamed = |link: &Link| seen.as_ref().is_none_or(|(name, _)| *name != link.name);
        if self.links.get(&index).is_some_and(renamed)
            && let Some(link) = self.links.remove(&index)
        {
            if let Some(holders) = self.holders.get_mut(&link.name) {
                holders.remove(&index);
                if holders.is_empty() {
                    self.holders.remove(&link.name);
                }
            }
            if self.reported.get(&link.name).is_some_and(|state| state.index == index) {
                self.reported.remove(&link.name);
                out.push(LinkEvent::Changed(Name::clone(&link.name), None));
            }
            self.settle(&link.name, out);
        }
        let Some((name, up)) = seen else {
            return;
        };
        let came_up = up && self.links.get(&index).is_none_or(|link| !link.up);
        self.generation += u32::from(came_up);
        let generation = self.generation;
        let link = self.links.entry(index).or_insert_with(|| Link { name: Name::clone(&name), up, generation });
        link.up = up;
        if came_up {
            link.generation = generation;
        }
        self.holders.entry(Name::clone(&name)).or_default().insert(index);
        self.settle(&name, out);
    }

    /// Reports on a name if exactly one index holds it.
    fn settle(&mut self, name: &Name, out: &mut Vec<LinkEvent>) {
        let Some(holders) = self.holders.get(name).filter(|holders| holders.len() == 1) else {
            return;
        };
        let Some((index, link)) = holders.first().and_then(|index| Some((*index, self.links.get(index)?))) else {
            return;
        };
        let state = LinkState { index, up: link.up, generation: link.generation };
        match self.reported.insert(Name::clone(name), state) {
            Some(old) if old == state => return,
            Some(old) if old.index != index => out.push(LinkEvent::Changed(Name::clone(name), None)),
            Some(_) | None => (),
        }
        out.push(LinkEvent::Changed(Name::clone(name), Some(state)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps `<milliseconds> <what>`; what is `up|down NAME INDEX`, `gone INDEX`, `tick`, or
    /// `list|doubt NAME INDEX up|down, …`; returns one line per event, with the time.
    #[track_caller]
    fn check(script: &[&str], expected: &[&str]) {
        let start = Instant::now();
        let mut tracker = Tracker::default();
        let mut got = Vec::new();
        for step in script {
            let (time, what) = step.split_once(' ').unwrap();
            let now = start + Duration::from_millis(time.parse().unwrap());
            let mut out = Vec::new();
            match what.split(' ').collect::<Vec<_>>()[..] {
                [state @ ("up" | "down"), name, index] => {
                    tracker.see(now, index.parse().unwrap(), Some((name.into(), state == "up")), &mut out);
                }
                ["gone", index] => tracker.see(now, index.parse().unwrap(), None, &mut out),
                ["tick"] => tracker.tick(now, &mut out),
                [kind @ ("list" | "doubt"), ..] => {
                    let list = what[kind.len()..].split(',').filter(|entry| !entry.trim().is_empty()).map(|entry| {
                        let [name, index, state] = entry.split_whitespace().collect::<Vec<_>>()[..] else { panic!() };
                        (index.parse().unwrap(), Name::from(name), state == "up")
                    });
                    tracker.list(now, list.collect(), kind == "doubt", &mut out);
                }
                ref other => panic!("bad step {other:?}"),
            }
            got.extend(out.iter().map(|event| match event {
                LinkEvent::Changed(name, Some(state)) => {
                    let up = if state.up { "up" } else { "down" };
                    format!("{time} {name} {} {up} g{}", state.index, state.generation)
                }
                LinkEvent::Changed(name, None) => format!("{time} {name} gone"),
                LinkEvent::InSync => "in sync".to_owned(),
            }));
        }
        assert_eq!(got, expected);
    }

    #[test]
    fn states_are_reported_once() {
        check(&["0 up cali1 7", "1 up cali1 7", "2 list cali1 7 up", "3 tick"], &["0 cali1 7 up g1"]);
    }

    #[test]
    fn a_new_interface_that_is_down_is_reported_at_once() {
        check(&["0 down cali1 7", "5 up cali1 7"], &["0 cali1 7 down g0", "5 cali1 7 up g1"]);
    }

    #[test]
    fn bad_news_waits_a_tenth_of_a_second() {
        check(
            &["0 up cali1 7", "10 down cali1 7", "109 tick", "110 tick", "200 gone 7", "299 tick", "300 tick"],
            &["0 cali1 7 up g1", "110 cali1 7 down g1", "300 cali1 gone"],
        );
    }

    #[test]
    fn a_short_outage_is_visible_in_the_generation() {
        check(
            &["0 up cali1 7", "10 down cali1 7", "60 up cali1 7", "109 tick", "110 tick"],
            &["0 cali1 7 up g1", "110 cali1 7 down g1", "110 cali1 7 up g2"],
        );
    }

    #[test]
    fn a_rename_is_an_end_and_a_beginning() {
        check(&["0 up cali1 7", "1 up cali2 7"], &["0 cali1 7 up g1", "1 cali1 gone", "1 cali2 7 up g2"]);
    }

    #[test]
    fn two_interfaces_can_exchange_their_names() {
        check(
            &["0 up a 1", "0 up b 2", "1 up tmp 1", "2 up a 2", "3 up b 1"],
            &[
                "0 a 1 up g1",
                "0 b 2 up g2",
                "1 a gone",
                "1 tmp 1 up g3",
                "2 b gone",
                "2 a 2 up g4",
                "3 tmp gone",
                "3 b 1 up g5",
            ],
        );
    }

    #[test]
    fn a_name_held_twice_is_not_reported_on_until_one_is_left() {
        check(
            &["0 up cali1 7", "1 up cali1 9", "2 down cali1 9", "3 gone 7", "102 tick", "103 tick"],
            &["0 cali1 7 up g1", "103 cali1 gone", "103 cali1 9 down g2"],
        );
        // The newer one goes first: the older was never forgotten.
        check(&["0 up cali1 7", "1 up cali1 9", "2 gone 9", "102 tick"], &["0 cali1 7 up g1"]);
    }

    #[test]
    fn an_index_used_again_at_once_is_reported_in_order() {
        check(
            &["0 up cali1 7", "10 gone 7", "20 up cali2 7", "110 tick"],
            &["0 cali1 7 up g1", "110 cali1 gone", "110 cali2 7 up g2"],
        );
    }

    #[test]
    fn a_list_brings_what_was_missed() {
        check(
            &["0 list a 1 up, b 2 down", "10 list b 2 up, c 3 up", "110 tick"],
            &["0 a 1 up g1", "0 b 2 down g1", "10 b 2 up g2", "10 c 3 up g3", "110 a gone"],
        );
    }

    #[test]
    fn a_list_agrees_with_what_is_held_back() {
        check(
            &["0 up a 1", "10 down a 1", "20 list a 1 down", "30 up a 1", "40 list a 1 up", "110 tick"],
            &["0 a 1 up g1", "110 a 1 down g1", "110 a 1 up g2"],
        );
        check(&["0 up a 1", "10 gone 1", "20 list", "110 tick", "120 list"], &["0 a 1 up g1", "110 a gone"]);
    }

    #[test]
    fn after_lost_messages_every_interface_that_is_up_counts_as_come_up() {
        check(
            &["0 list a 1 up, b 2 down", "10 doubt a 1 up, b 2 down"],
            &["0 a 1 up g1", "0 b 2 down g1", "10 a 1 up g2"],
        );
    }

    #[test]
    fn the_next_timeout_is_that_of_the_first_that_may_pass() {
        let now = Instant::now();
        let mut tracker = Tracker::default();
        let mut out = Vec::new();
        tracker.see(now, 1, Some(("a".into(), true)), &mut out);
        assert_eq!(tracker.next_timeout(), None);
        tracker.see(now, 1, None, &mut out);
        assert_eq!(tracker.next_timeout(), Some(now + DAMPING));
        tracker.tick(now + DAMPING, &mut out);
        assert_eq!((tracker.next_timeout(), tracker.links.len(), tracker.holders.len()), (None, 0, 0));
    }
}
