//! Shared chains in which somebody else keeps moving our rules (U15.a).
//!
//! Used by [`super::table`]. A rule of ours that was displaced is put back at once; when that has happened three
//! times in five minutes, insisting more often than once per refresh period would only be a fight without end
//! (felix#1118): one warning names the rules above ours and who was seen, and the pauses between repairs grow to
//! the refresh period until it has been quiet.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Displacements within [`WINDOW`] that make a fight.
const DISPLACEMENTS: usize = 3;
const WINDOW: Duration = Duration::from_secs(300);

/// Between repairs if the refresh is off.
const USUAL_PERIOD: Duration = Duration::from_secs(180);

/// The fights over the chains of one table.
#[derive(Debug, Default)]
pub(super) struct Fights {
    chains: BTreeMap<Box<str>, Fight>,
}

#[derive(Debug, Default)]
struct Fight {
    displaced: VecDeque<Instant>,
    /// Set while it is a fight: when our rules may be put back next.
    repair_at: Option<Instant>,
    said: bool,
}

impl Fights {
    /// Our rules in the chain were found displaced.
    pub(super) fn displaced(&mut self, chain: &str, now: Instant, period: Option<Duration>) {
        let fight = self.chains.entry(chain.into()).or_default();
        while fight.displaced.front().is_some_and(|first| now.saturating_duration_since(*first) > WINDOW) {
            fight.displaced.pop_front();
        }
        fight.displaced.push_back(now);
        if fight.repair_at.is_none() && fight.displaced.len() >= DISPLACEMENTS {
            fight.repair_at = Some(now + period.unwrap_or(USUAL_PERIOD));
        }
    }

    /// Returns whether a fight was just found and nobody was told.
    pub(super) fn is_news(&self, chain: &str) -> bool {
        self.chains.get(chain).is_some_and(|fight| fight.repair_at.is_some() && !fight.said)
    }

    /// Somebody was told.
    pub(super) fn said(&mut self, chain: &str) {
        if let Some(fight) = self.chains.get_mut(chain) {
            fight.said = true;
        }
    }

    /// Our rules in the chain were written.
    pub(super) fn repaired(&mut self, chain: &str, now: Instant, period: Option<Duration>) {
        if let Some(fight) = self.chains.get_mut(chain)
            && let Some(repair_at) = &mut fight.repair_at
        {
            *repair_at = now + period.unwrap_or(USUAL_PERIOD);
        }
    }

    /// Something else is wanted in the chain, which does not wait.
    pub(super) fn insist(&mut self, chain: &str, now: Instant) {
        if let Some(fight) = self.chains.get_mut(chain) {
            fight.repair_at = fight.repair_at.map(|at| at.min(now));
        }
    }

    /// When the chain may be repaired, if it is fought over.
    pub(super) fn repair_at(&self, chain: &str) -> Option<Instant> {
        self.chains.get(chain)?.repair_at
    }

    /// When the chain may be repaired, if not now.
    pub(super) fn waits_until(&self, chain: &str, now: Instant) -> Option<Instant> {
        self.chains.get(chain)?.repair_at.filter(|at| *at > now)
    }

    /// Ends fights that nobody has fought for a while. Returns their chains.
    pub(super) fn calm_down(&mut self, now: Instant, period: Option<Duration>) -> Vec<Box<str>> {
        let quiet = WINDOW.max(period.unwrap_or(USUAL_PERIOD) * 2);
        let is_over =
            |fight: &Fight| fight.displaced.back().is_none_or(|last| now.saturating_duration_since(*last) > quiet);
        let over = self.chains.iter().filter(|(_, fight)| is_over(fight));
        let named: Vec<_> = over.filter(|(_, fight)| fight.said).map(|(chain, _)| chain.clone()).collect();
        self.chains.retain(|_, fight| !is_over(fight));
        named
    }

    /// Chains that are fought over.
    pub(super) fn chains(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().filter(|(_, fight)| fight.repair_at.is_some()).map(|(chain, _)| &**chain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Option<Duration> = Some(Duration::from_secs(90));

    #[test]
    fn three_displacements_in_five_minutes_are_a_fight_with_one_repair_per_period() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let mut fights = Fights::default();
        for (secs, is_fight) in [(0, false), (250, false), (301, false), (400, true)] {
            fights.displaced("FORWARD", at(secs), PERIOD);
            assert_eq!(fights.waits_until("FORWARD", at(secs)).is_some(), is_fight, "{secs}");
        }
        assert!(fights.is_news("FORWARD"));
        fights.said("FORWARD");
        assert!(!fights.is_news("FORWARD"));
        assert_eq!(fights.waits_until("FORWARD", at(400)), Some(at(490)));
        assert_eq!(fights.waits_until("FORWARD", at(490)), None);
        fights.repaired("FORWARD", at(490), PERIOD);
        fights.displaced("FORWARD", at(491), PERIOD);
        assert_eq!(fights.waits_until("FORWARD", at(491)), Some(at(580)));
        // What we want to change ourselves does not wait.
        fights.insist("FORWARD", at(500));
        assert_eq!(fights.waits_until("FORWARD", at(500)), None);
        assert_eq!(fights.chains().collect::<Vec<_>>(), ["FORWARD"]);
        assert!(fights.calm_down(at(700), PERIOD).is_empty());
        assert_eq!(fights.calm_down(at(800), PERIOD), ["FORWARD".into()]);
        assert_eq!(fights.chains().count(), 0);
    }
}
