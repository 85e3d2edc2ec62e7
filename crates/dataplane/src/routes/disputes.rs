//! Who takes our routes away, and how often (U15.d).
//!
//! Fed by the route driver with every route of ours that somebody else removed or changed. Pure.
//!
//! Invariant: what is remembered is bounded by the routes that were taken within the last minute.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use model::Family;

use super::plan::RouteKey;

/// So many times within [`WINDOW`] make a dispute.
const TIMES: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);
/// Between two repairs of a route in dispute: soon enough for the bar, too slow to be a load.
const PACE: Duration = Duration::from_millis(100);

/// Somebody may take ten thousand routes at once; they are not looked through for each.
const PRUNING: Duration = Duration::from_secs(1);

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(super) struct Disputes {
    routes: BTreeMap<(Family, RouteKey), Taken>,
    /// When those that were left alone were last forgotten.
    pruned: Option<Instant>,
}

#[derive(Debug, Default)]
struct Taken {
    times: VecDeque<Instant>,
    said: bool,
}

impl Disputes {
    /// Notes that a route was taken. True if that is worth a warning: once, until it was left alone for a
    /// minute.
    pub(super) fn taken(&mut self, family: Family, key: RouteKey, now: Instant) -> bool {
        if self.pruned.is_none_or(|pruned| now >= pruned + PRUNING) {
            self.pruned = Some(now);
            self.routes.retain(|_, taken| !taken.is_over(now));
        }
        let taken = self.routes.entry((family, key)).or_default();
        if taken.is_over(now) {
            *taken = Taken::default();
        }
        taken.times.push_back(now);
        if taken.times.len() > TIMES {
            taken.times.pop_front();
        }
        let often = taken.is_often(now);
        often && !std::mem::replace(&mut taken.said, true)
    }

    /// Until when the next repair of a route is to wait; `None` if it need not.
    pub(super) fn not_before(&self, family: Family, key: &RouteKey, now: Instant) -> Option<Instant> {
        let taken = self.routes.get(&(family, *key)).filter(|taken| taken.is_often(now))?;
        taken.times.back().map(|last| *last + PACE).filter(|until| *until > now)
    }

    /// Routes in dispute.
    pub(super) fn len(&self, now: Instant) -> usize {
        self.routes.values().filter(|taken| taken.is_often(now)).count()
    }
}

impl Taken {
    fn is_over(&self, now: Instant) -> bool {
        self.times.back().is_none_or(|last| now >= *last + WINDOW)
    }

    fn is_often(&self, now: Instant) -> bool {
        self.times.len() == TIMES && self.times.front().is_some_and(|first| now < *first + WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fifth_time_within_a_minute_is_said_once_until_a_minute_was_quiet() {
        let start = Instant::now();
        let key = |n: u8| RouteKey { destination: format!("10.65.0.{n}/32").parse().unwrap(), tos: 0, metric: 0 };
        let mut disputes = Disputes::default();
        let mut said = Vec::new();
        for second in [0, 20, 40, 59, 61, 79, 80, 81, 139, 200, 201, 202, 203, 204, 205] {
            let now = start + Duration::from_secs(second);
            if disputes.taken(Family::V4, key(1), now) {
                said.push(second);
            }
            assert!(!disputes.taken(Family::V4, key(u8::try_from(second).unwrap() + 2), now));
        }
        // Five up to second 79 lie within a minute (20 to 79); the second one from 139 on.
        assert_eq!(said, [79, 204]);
        let now = start + Duration::from_secs(205);
        assert_eq!((disputes.len(now), disputes.routes.len()), (1, 7));
        assert_eq!(disputes.not_before(Family::V4, &key(1), now), Some(now + PACE));
        assert_eq!(disputes.not_before(Family::V4, &key(1), now + PACE), None);
        assert_eq!(disputes.not_before(Family::V6, &key(1), now), None);
        assert_eq!(disputes.not_before(Family::V4, &key(207), now), None);
    }
}
