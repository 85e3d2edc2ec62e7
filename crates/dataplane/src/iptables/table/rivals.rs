//! What somebody else does to a table: whether it concerns us, and who keeps displacing our rules (U15.a).
//!
//! Part of the table driver; [`Fights`](crate::iptables::fight::Fights) counts.

use std::collections::BTreeSet;
use std::time::Instant;

use tracing::warn;

use super::reading::SHORTEST_CHECK;
use super::{ForeignChange, TableDriver};
use crate::driver::Driver as _;
use crate::iptables::base_chain;
use crate::iptables::parse::{Entry, View, is_our_chain};
use crate::nftables::{Process, Touched};

/// Rules above ours that one line of the log quotes.
const MAX_RULES_IN_LOG: usize = 5;

impl TableDriver {
    /// Takes note of what somebody else did. Returns whether it concerns us, so that it must be looked at.
    pub fn doubt(&mut self, change: &ForeignChange, now: Instant) -> bool {
        if change.is_doubtful {
            let pause = SHORTEST_CHECK;
            self.check = Some(self.check.map_or((now, pause), |(at, pause)| (at.min(now), pause)));
            return false;
        }
        let concerns = match &change.what {
            Touched::All => {
                self.distrust();
                true
            }
            Touched::Chains(names) => {
                let ours: Vec<_> = names.iter().filter(|name| self.knows(name)).cloned().collect();
                let before = self.doubtful.len();
                if self.view.is_some() {
                    self.doubtful.extend(ours);
                }
                self.doubtful.len() > before
            }
        };
        if concerns {
            self.rival.clone_from(&change.by);
        }
        concerns
    }

    /// Whether changes of the chain concern us: it is ours, a base chain, or foreign with a rule of ours in it.
    fn knows(&self, name: &str) -> bool {
        is_our_chain(name)
            || base_chain(name).is_some()
            || self.view.as_ref().is_some_and(|view| view.shared.contains_key(name))
    }

    /// Base chains in which somebody else keeps displacing our rules.
    pub fn fighting(&self) -> Vec<String> {
        self.fights.chains().map(str::to_owned).collect()
    }

    /// A fight is told of with the rules above ours, which only a listing shows.
    pub(super) fn wants_listing_for_a_fight(&self) -> bool {
        self.dirty_hooks.iter().any(|name| self.fights.is_news(name))
    }

    /// Counts the shared chains in which our rules are not where we have put them, and tells of fights.
    pub(super) fn note_fights(&mut self, view: &View, hooks: &BTreeSet<Box<str>>, listing: Option<&str>, now: Instant) {
        if !self.settled_once {
            return;
        }
        for name in hooks {
            let ours_are_there = |entries: &Vec<Entry>| entries.iter().any(|entry| *entry != Entry::Foreign);
            let was_right = !self.dirty_hooks.contains(name) && self.hooks.contains_key(name);
            // Rules that are gone altogether were flushed, not displaced: that is put right as often as it happens.
            if was_right && view.shared.get(name).is_some_and(ours_are_there) {
                self.fights.displaced(name, now, self.checks.refresh);
            }
            if self.fights.is_news(name)
                && let Some(listing) = listing
            {
                self.fights.said(name);
                let rules = rules_above_ours(listing, name);
                let by = self
                    .rival
                    .as_ref()
                    .map_or_else(|| "unknown".to_owned(), |Process { pid, name }| format!("{name} ({pid})"));
                warn!(
                    event = "fighting",
                    table = self.label(),
                    chain = %name,
                    above = rules.join("; "),
                    by,
                    "somebody keeps displacing our rules; from now on they are put back once per refresh period"
                );
            }
        }
    }
}

/// The first rules of a chain in a listing, up to the first of ours.
fn rules_above_ours(listing: &str, chain: &str) -> Vec<String> {
    let start = format!("-A {chain} ");
    let rules = listing.lines().filter_map(|line| line.strip_prefix(&start));
    let foreign = rules.take_while(|rule| !rule.contains("\"cali:") && !rule.contains("-j cali-"));
    foreign.take(MAX_RULES_IN_LOG).map(str::to_owned).collect()
}
