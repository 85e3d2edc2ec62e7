//! Which policies are active on this host (policy.md A-2).
//!
//! Input: records of policies with the number of their selector, and matches of local endpoints (from `selectors`).
//! Output: [`ActiveDelta`], consumed by `references` and `order`; and the selectors whose list of
//! policies looks different to an endpoint, consumed by `endpoints`.
//!
//! Law: *active = { policy | always needed, or its selector matches a local endpoint }*.
//! Per policy the output alternates `Activated`/`Deactivated`; a `Changed` only appears between the
//! two, and only with a value that differs.

use model::{Name, PolicyKey};

use crate::kit::{Column, Groups};
use crate::names::Names;
use crate::policies::PolicyKeys;
use crate::records::{Outline, Records};
use crate::selectors::MatchDelta;

/// What an active policy is, was, or no longer is. `id` is its number while it is stored; `record` is
/// where its rules are, until the next update.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ActiveDelta {
    Activated {
        id: u32,
        record: u32,
        listed: Listed,
    },
    /// `same_program`: nothing changed that concerns more than the endpoints.
    Changed {
        id: u32,
        record: u32,
        listed: Listed,
        old_tier: Name,
        same_program: bool,
    },
    Deactivated {
        id: u32,
        listed: Listed,
    },
}

/// An active policy as it is listed for endpoints.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Listed {
    pub(crate) key: PolicyKey,
    pub(crate) outline: Outline,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct ActivePolicies {
    keys: PolicyKeys,
    stored: Column<Option<Stored>>,
    /// The policies that use a selector.
    by_selector: Groups,
    /// By selector: how many classes of local endpoints match.
    classes: Column<u32>,
    /// The active ones, in the order of their places.
    listed: Vec<Option<Listed>>,
    free: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    record: u32,
    selector: u32,
    /// Place in the list of active policies, if it is one.
    place: Place,
}

/// A number that is smaller than the largest, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u32);

impl Place {
    const NONE: Self = Self(u32::MAX);
}

impl ActivePolicies {
    /// The record of a policy that is stored, for early cut-off.
    pub(crate) fn record(&self, names: &Names, records: &Records, key: &PolicyKey) -> Option<u32> {
        self.stored(self.keys.find(names, records.bytes(), key)?).map(|stored| stored.record)
    }

    fn stored(&self, id: u32) -> Option<&Stored> {
        self.stored.get(id)?.as_ref()
    }

    /// Stores a policy: its record and the number of its selector, whose matches this stage has already
    /// been told. Returns the number of the selector that the policy had before; the caller gives that
    /// use up afterwards, so that a policy that is matched before and after stays active throughout.
    pub(crate) fn on_policy(
        &mut self,
        (names, records): (&mut Names, &mut Records),
        key: &PolicyKey,
        value: Option<(u32, u32)>,
        out: &mut Vec<ActiveDelta>,
        relisted: &mut Vec<u32>,
    ) -> Option<u32> {
        let id = match value {
            Some(_) => self.keys.insert(names, records.bytes_mut(), key),
            None => self.keys.find(names, records.bytes(), key)?,
        };
        let old = self.stored.take(id);
        let old_listed = old.and_then(|old| self.unlist(old.place));
        if let Some(old) = old {
            self.by_selector.leave(old.selector, id);
        }
        let listed = value.and_then(|(record, selector)| {
            let is_active = records.is_always_needed(record) || self.classes.get(selector).is_some_and(|n| *n > 0);
            let outline = is_active.then(|| records.outline(names, record, self.like(selector)));
            Some(Listed { key: key.clone(), outline: outline?? })
        });

        let same_list = match (old, value) {
            (Some(old), Some((record, selector))) => {
                old.selector == selector && records.have_equal_outlines(old.record, record)
            }
            (None, Some(_)) | (Some(_), None) | (None, None) => false,
        };
        if !same_list {
            relisted.extend(old.map(|old| old.selector));
            relisted.extend(value.map(|(_, selector)| selector));
        }

        match (value, old_listed, &listed) {
            (Some((record, _)), Some(old_listed), Some(listed)) => out.push(ActiveDelta::Changed {
                id,
                record,
                listed: listed.clone(),
                old_tier: old_listed.outline.tier,
                same_program: old.is_some_and(|old| records.have_equal_programs(old.record, record)),
            }),
            (Some((record, _)), None, Some(listed)) => {
                out.push(ActiveDelta::Activated { id, record, listed: listed.clone() });
            }
            (_, Some(listed), None) => out.push(ActiveDelta::Deactivated { id, listed }),
            (_, None, None) | (None, _, Some(_)) => (),
        }

        if let Some((record, selector)) = value {
            let place = listed.map_or(Place::NONE, |listed| self.list(listed));
            self.by_selector.join(selector, id);
            self.stored.replace(id, Some(Stored { record, selector, place }));
        } else {
            self.keys.remove(names, records.bytes_mut(), id);
        }
        if let Some(old) = old {
            records.discard_policy(names, old.record);
        }
        if self.keys.is_empty() {
            self.stored = Column::default();
            self.by_selector = Groups::default();
            (self.listed, self.free) = Default::default();
        }
        old.map(|old| old.selector)
    }

    pub(crate) fn on_match(
        &mut self,
        (names, records): (&Names, &Records),
        delta: MatchDelta,
        out: &mut Vec<ActiveDelta>,
    ) {
        let (selector, started) = match delta {
            MatchDelta::Started { selector, .. } => (selector, true),
            MatchDelta::Stopped { selector, .. } => (selector, false),
        };
        let classes = self.classes.slot(selector);
        let edge = if started {
            *classes += 1;
            *classes == 1
        } else {
            debug_assert!(*classes > 0, "a selector stopped matching a class that it did not match");
            *classes = classes.saturating_sub(1);
            *classes == 0
        };
        if !edge {
            return;
        }
        let mut next = self.by_selector.first(selector);
        while let Some(id) = next {
            next = self.by_selector.after(id);
            let Some(stored) = self.stored(id).copied() else { continue };
            let is_active = started || records.is_always_needed(stored.record);
            if is_active == (stored.place != Place::NONE) {
                continue;
            }
            let place = if is_active {
                let outline = records.outline(names, stored.record, self.like(selector));
                let Some((key, outline)) = self.keys.get(names, records.bytes(), id).zip(outline) else { continue };
                let listed = Listed { key, outline };
                out.push(ActiveDelta::Activated { id, record: stored.record, listed: listed.clone() });
                self.list(listed)
            } else {
                out.extend(self.unlist(stored.place).map(|listed| ActiveDelta::Deactivated { id, listed }));
                Place::NONE
            };
            self.stored.replace(id, Some(Stored { place, ..stored }));
        }
    }

    /// An active policy of this selector, to share text with. Whichever it is, the text is the same.
    fn like(&self, selector: u32) -> Option<(u32, &Outline)> {
        let stored = self.stored(self.by_selector.first(selector)?)?;
        Some((stored.record, &self.listed_at(stored.place)?.outline))
    }

    fn listed_at(&self, place: Place) -> Option<&Listed> {
        self.listed.get(place.0 as usize)?.as_ref()
    }

    fn list(&mut self, listed: Listed) -> Place {
        let place = self.free.pop().unwrap_or(self.listed.len() as u32);
        match self.listed.get_mut(place as usize) {
            Some(slot) => *slot = Some(listed),
            None => self.listed.push(Some(listed)),
        }
        Place(place)
    }

    fn unlist(&mut self, place: Place) -> Option<Listed> {
        let listed = self.listed.get_mut(place.0 as usize)?.take();
        self.free.push(place.0);
        if self.free.len() == self.listed.len() {
            (self.listed, self.free) = Default::default();
        }
        listed
    }

    /// The active policies that have this selector.
    pub(crate) fn with_selector(&self, selector: u32) -> impl Iterator<Item = (&PolicyKey, &Outline)> {
        let listed = self.by_selector.items(selector).filter_map(|id| self.listed_at(self.stored(id)?.place));
        listed.map(|Listed { key, outline }| (key, outline))
    }

    pub(crate) fn selector_of(&self, id: u32) -> Option<u32> {
        self.stored(id).map(|stored| stored.selector)
    }

    /// How many policies are active.
    pub(crate) fn active(&self) -> usize {
        self.listed.len() - self.free.len()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 6] {
        let [keys, numbers] = self.keys.sizes();
        let grouped = |selector| self.by_selector.items(selector).count();
        [
            keys,
            numbers,
            ("stored policies", self.stored.iter().filter(|(_, stored)| stored.is_some()).count()),
            ("policies by selector", (0..1_000).map(grouped).sum()),
            ("classes of policies", self.classes.iter().map(|(_, count)| *count as usize).sum()),
            ("active policies", self.listed.iter().flatten().count()),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.active() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use model::Policy;
    use testkit::build;

    use super::*;

    #[test]
    fn a_policy_is_active_from_its_first_match_to_its_last() {
        check(&[
            ("policy web 1", "relist 1"),
            ("match 1 7", "Activated np/ns/web"),
            ("match 1 8", ""),
            ("unmatch 1 7", ""),
            ("unmatch 1 8", "Deactivated np/ns/web"),
        ]);
    }

    #[test]
    fn updates_while_inactive_are_silent_and_a_deletion_while_matched_deactivates() {
        check(&[
            ("policy web 1 order=1", "relist 1"),
            ("policy web 1 order=2", "relist 1 1"),
            ("match 1 7", "Activated np/ns/web"),
            ("policy web 1 order=3", "Relisted np/ns/web, relist 1 1"),
            ("delete web", "Deactivated np/ns/web, relist 1"),
            ("unmatch 1 7", ""),
        ]);
    }

    #[test]
    fn the_order_of_match_and_value_does_not_matter() {
        check(&[
            ("match 1 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy db 1", "Activated np/ns/db, relist 1"),
        ]);
    }

    #[test]
    fn a_change_of_rules_alone_concerns_no_endpoint() {
        check(&[
            ("match 1 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy web 1 rule", "Changed np/ns/web"),
            ("policy web 1 rule egress=no", "Relisted np/ns/web, relist 1 1"),
        ]);
    }

    #[test]
    fn a_policy_that_is_matched_by_another_selector_stays_active() {
        check(&[
            ("match 1 7", ""),
            ("match 2 7", ""),
            ("policy web 1", "Activated np/ns/web, relist 1"),
            ("policy web 2", "Relisted np/ns/web, relist 1 2"),
            ("policy web 3", "Deactivated np/ns/web, relist 2 3"),
        ]);
    }

    #[test]
    fn a_policy_that_is_always_needed_does_not_wait_for_a_match() {
        check(&[
            ("policy web 1 always", "Activated np/ns/web, relist 1"),
            ("match 1 7", ""),
            ("unmatch 1 7", ""),
            ("policy web 1", "Deactivated np/ns/web"),
        ]);
    }

    /// Runs a script and compares what the stage emits at each step. The only place that calls it.
    #[track_caller]
    fn check(script: &[(&str, &str)]) {
        let mut stage = ActivePolicies::default();
        let (mut names, mut records) = (Names::default(), Records::default());
        for (step, expected) in script {
            let (mut out, mut relisted) = (Vec::new(), Vec::new());
            let number = |text: &str| text.parse::<u32>().unwrap();
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["policy", name, selector, ref options @ ..] => {
                    let (key, policy) = policy(name, options);
                    let record = records.store_policy(&mut names, &policy);
                    let value = Some((record, number(selector)));
                    stage.on_policy((&mut names, &mut records), &key, value, &mut out, &mut relisted);
                    let stored = stage.record(&names, &records, &key).unwrap();
                    assert!(records.are_equal(stored, record));
                }
                ["delete", name] => {
                    let key = policy(name, &[]).0;
                    stage.on_policy((&mut names, &mut records), &key, None, &mut out, &mut relisted);
                    assert_eq!(stage.record(&names, &records, &key), None);
                }
                ["match", selector, class] => {
                    let delta = MatchDelta::Started { selector: number(selector), class: number(class) };
                    stage.on_match((&names, &records), delta, &mut out);
                }
                ["unmatch", selector, class] => {
                    let delta = MatchDelta::Stopped { selector: number(selector), class: number(class) };
                    stage.on_match((&names, &records), delta, &mut out);
                }
                ref other => panic!("step {other:?}"),
            }
            let mut got: Vec<String> = Vec::new();
            for delta in out {
                got.push(match delta {
                    ActiveDelta::Activated { listed, .. } => format!("Activated {}", listed.key),
                    ActiveDelta::Changed { listed, same_program: false, .. } => format!("Changed {}", listed.key),
                    ActiveDelta::Changed { listed, same_program: true, .. } => format!("Relisted {}", listed.key),
                    ActiveDelta::Deactivated { listed, .. } => format!("Deactivated {}", listed.key),
                });
            }
            if !relisted.is_empty() {
                let selectors: Vec<String> = relisted.iter().map(ToString::to_string).collect();
                got.push(format!("relist {}", selectors.join(" ")));
            }
            assert_eq!(got.join(", "), *expected, "step {step:?} of {script:?}");
        }
        for name in ["web", "db"] {
            let key = policy(name, &[]).0;
            stage.on_policy((&mut names, &mut records), &key, None, &mut Vec::new(), &mut Vec::new());
        }
        assert!(stage.is_empty() && records.is_empty() && names.is_empty());
    }

    fn policy(name: &str, options: &[&str]) -> (PolicyKey, Arc<Policy>) {
        let mut builder = build::policy(&format!("np/ns/{name}"));
        for option in options {
            builder = match option.split_once('=') {
                Some(("order", order)) => builder.order(order.parse().unwrap()),
                Some(("egress", _)) => builder.with(|policy| policy.egress = false),
                None if *option == "rule" => builder.ingress("allow"),
                None if *option == "always" => builder.with(|policy| policy.always_needed = true),
                Some(_) | None => panic!("option {option:?}"),
            };
        }
        builder.value()
    }
}
