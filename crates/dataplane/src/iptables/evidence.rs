//! What speaks for one iptables variant or the other, and what is made of it (netfilter.md 18.1, U6.a, U6.b).
//!
//! Fed by the host; feeds [`super::backend`] and whoever explains the choice to an operator. Looking makes nothing
//! (U6.f): tables of the nft variant are read over netlink, and of the legacy variant only those that the kernel has
//! already, because its save program makes the others.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use model::Family;
use tracing::{info, warn};

use super::native::Native;
use super::parse::{self, is_our_chain, is_our_comment};
use super::variant::{Programs, legacy_tables};
use crate::exec;
use crate::options::Variant;

/// Tables that iptables knows; others in nf_tables belong to others.
const TABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];

/// Parts of the names of chains by which kubelet marks the variant that it uses.
const MARKERS: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

/// What one variant holds for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    pub variant: Variant,
    pub family: Family,
    /// Tables of iptables that exist.
    pub tables: BTreeSet<String>,
    /// Rules in chains of ours, and rules in other chains that we made.
    pub ours: usize,
    pub foreign: usize,
    /// Chains by which Kubernetes marks this variant.
    pub markers: BTreeSet<String>,
    /// What the restore program prints for its version, if the variant is installed under its own name.
    pub version: Option<String>,
    /// Why something could not be looked at; the counts are then too low.
    pub unreadable: Option<String>,
}

impl Side {
    fn new(variant: Variant, family: Family) -> Self {
        Self {
            variant,
            family,
            tables: BTreeSet::new(),
            ours: 0,
            foreign: 0,
            markers: BTreeSet::new(),
            version: None,
            unreadable: None,
        }
    }

    /// Takes the names of chains and whether each rule is ours.
    fn take<'a>(&mut self, chains: impl IntoIterator<Item = &'a str>, rules: impl IntoIterator<Item = bool>) {
        let marked = |chain: &&str| MARKERS.iter().any(|marker| chain.contains(marker));
        self.markers.extend(chains.into_iter().filter(marked).map(str::to_owned));
        for is_ours in rules {
            if is_ours {
                self.ours += 1;
            } else {
                self.foreign += 1;
            }
        }
    }
}

/// What the host shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    pub sides: Vec<Side>,
}

impl Evidence {
    fn of(&self, variant: Variant) -> impl Iterator<Item = &Side> {
        self.sides.iter().filter(move |side| side.variant == variant)
    }

    fn is_marked(&self, variant: Variant) -> bool {
        self.of(variant).any(|side| !side.markers.is_empty())
    }

    fn rules(&self, variant: Variant) -> usize {
        self.of(variant).map(|side| side.ours + side.foreign).sum()
    }

    /// What the reference would choose; a host without any rules gets legacy.
    pub fn favours(&self) -> Variant {
        if self.is_marked(Variant::Nft) {
            Variant::Nft
        } else if self.is_marked(Variant::Legacy) || self.rules(Variant::Legacy) >= self.rules(Variant::Nft) {
            Variant::Legacy
        } else {
            Variant::Nft
        }
    }

    /// Returns whether something of somebody else speaks for `variant`; equal emptiness does not.
    fn speaks_for(&self, variant: Variant) -> bool {
        let foreign = |variant| self.of(variant).map(|side| side.foreign).sum::<usize>();
        self.is_marked(variant) || foreign(variant) > foreign(variant.other())
    }
}

/// Why a variant was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// `IptablesBackend` names it.
    Configured,
    /// It was in use at the last start.
    Remembered,
    /// The evidence favours it.
    Evidence,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configured => "IptablesBackend names it",
            Self::Remembered => "it was in use at the last start",
            Self::Evidence => "what is on the host favours it",
        })
    }
}

/// The choice with all that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub evidence: Evidence,
    pub configured: Option<Variant>,
    pub remembered: Option<Variant>,
    pub chosen: Variant,
    pub reason: Reason,
}

impl Decision {
    /// Chooses: configuration before memory before evidence.
    pub fn new(evidence: Evidence, configured: Option<Variant>, remembered: Option<Variant>) -> Self {
        let (chosen, reason) = match (configured, remembered) {
            (Some(variant), _) => (variant, Reason::Configured),
            (None, Some(variant)) => (variant, Reason::Remembered),
            (None, None) => (evidence.favours(), Reason::Evidence),
        };
        Self { evidence, configured, remembered, chosen, reason }
    }

    /// Returns the other variant if the host looks as if that should have been chosen.
    pub fn contradiction(&self) -> Option<Variant> {
        let favoured = self.evidence.favours();
        (favoured != self.chosen && self.evidence.speaks_for(favoured)).then_some(favoured)
    }

    /// Writes the evidence and the choice into the log, one line for each variant and family.
    pub fn log(&self) {
        let word = |variant: Option<Variant>, otherwise| variant.map_or(otherwise, Variant::as_str);
        for side in &self.evidence.sides {
            let Side { variant, family, tables, ours, foreign, markers, version, unreadable } = side;
            info!(
                variant = variant.as_str(),
                family = family.digit(),
                tables = joined(tables),
                ours,
                foreign,
                markers = joined(markers),
                version = version.as_deref().unwrap_or("not installed"),
                unreadable = unreadable.as_deref().unwrap_or("no"),
                configured = word(self.configured, "auto"),
                remembered = word(self.remembered, "none"),
                chosen = self.chosen.as_str(),
                reason = %self.reason,
                "iptables variant looked at"
            );
        }
        if let Some(other) = self.contradiction() {
            let (chosen, other) = (self.chosen.as_str(), other.as_str());
            warn!(chosen, other, reason = %self.reason, "the host looks as if it used the other iptables variant; IptablesBackend decides");
        }
    }
}

fn joined(words: &BTreeSet<String>) -> String {
    if words.is_empty() { "none".to_owned() } else { words.iter().map(String::as_str).collect::<Vec<_>>().join(" ") }
}

/// Looks at both variants.
pub async fn gather(
    families: impl Iterator<Item = Family>,
    directories: &[PathBuf],
    program_timeout: Duration,
    netlink_timeout: Duration,
) -> Evidence {
    let mut evidence = Evidence::default();
    for family in families {
        for mut side in [nft(family, netlink_timeout), legacy(family, directories, program_timeout).await] {
            side.version = version(family, side.variant, directories, program_timeout).await;
            evidence.sides.push(side);
        }
    }
    evidence
}

fn nft(family: Family, timeout: Duration) -> Side {
    let mut side = Side::new(Variant::Nft, family);
    let mut native = Native::new(family, timeout);
    let mut look = || -> std::io::Result<()> {
        side.tables = native.tables()?.iter().map(|name| name.to_string()).collect();
        side.tables.retain(|name| TABLES.contains(&name.as_str()));
        if side.tables.is_empty() {
            return Ok(());
        }
        let chains = native.chains()?;
        let chains = chains.iter().filter(|chain| side.tables.contains(&*chain.table));
        let chains: Vec<&str> = chains.map(|chain| &*chain.name).collect();
        side.take(chains, []);
        for table in side.tables.clone() {
            let rules = native.rules(&table, None)?;
            side.take(
                [],
                rules.iter().map(|rule| {
                    is_our_chain(&rule.chain)
                        || rule.jump.as_deref().is_some_and(is_our_chain)
                        || rule.comments.iter().any(|comment| is_our_comment(comment))
                }),
            );
        }
        Ok(())
    };
    side.unreadable = look().err().map(|error| error.to_string());
    side
}

async fn legacy(family: Family, directories: &[PathBuf], limit: Duration) -> Side {
    let mut side = Side::new(Variant::Legacy, family);
    let names = legacy_tables(family).unwrap_or_default();
    side.tables = names.lines().filter(|name| TABLES.contains(name)).map(str::to_owned).collect();
    if side.tables.is_empty() {
        return side;
    }
    let programs = match Programs::find(family, Variant::Legacy, directories) {
        Ok(programs) => programs,
        Err(error) => {
            side.unreadable = Some(error.to_string());
            return side;
        }
    };
    for table in side.tables.clone() {
        // Without a name it lists all that are loaded; one by one a failure costs one table.
        match exec::run(&programs.save, &["-t".to_owned(), table.clone()], "", limit).await {
            Ok(finished) if finished.status == 0 => {
                let chains = finished.stdout.lines().filter_map(|line| line.strip_prefix(':'));
                side.take(chains.filter_map(|rest| rest.split(' ').next()), parse::rules_are_ours(&finished.stdout));
            }
            Ok(finished) => side.unreadable = Some(format!("{table}: status {}", finished.status)),
            Err(error) => side.unreadable = Some(format!("{table}: {}", error.full_text())),
        }
    }
    side
}

async fn version(family: Family, variant: Variant, directories: &[PathBuf], limit: Duration) -> Option<String> {
    let programs = Programs::find_named(family, variant, directories)?;
    let finished = exec::run(&programs.restore, &["--version".to_owned()], "", limit).await.ok()?;
    Some(finished.stdout.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(legacy: (bool, usize), nft: (bool, usize)) -> Evidence {
        let side = |variant, (marked, foreign): (bool, usize)| {
            let markers = marked.then(|| MARKERS[1].to_owned()).into_iter().collect();
            Side { foreign, markers, ..Side::new(variant, Family::V4) }
        };
        Evidence { sides: vec![side(Variant::Legacy, legacy), side(Variant::Nft, nft)] }
    }

    #[test]
    fn evidence_favours_marks_first_and_then_the_number_of_rules() {
        let cases = [
            ((false, 0), (false, 0), Variant::Legacy),
            ((false, 5), (false, 5), Variant::Legacy),
            ((false, 5), (false, 6), Variant::Nft),
            ((true, 0), (false, 9), Variant::Legacy),
            ((false, 9), (true, 0), Variant::Nft),
            ((true, 9), (true, 0), Variant::Nft),
        ];
        for (legacy, nft, expected) in cases {
            assert_eq!(evidence(legacy, nft).favours(), expected, "{legacy:?} {nft:?}");
        }
    }

    /// U6.b
    #[test]
    fn the_choice_stays_unless_the_configuration_names_another() {
        let (legacy, nft) = (Some(Variant::Legacy), Some(Variant::Nft));
        let hundred = evidence((false, 100), (false, 3));
        let nothing = evidence((false, 0), (false, 0));
        let cases = [
            (&hundred, None, None, Variant::Legacy, Reason::Evidence, None),
            (&hundred, None, nft, Variant::Nft, Reason::Remembered, legacy),
            (&hundred, legacy, nft, Variant::Legacy, Reason::Configured, None),
            (&hundred, nft, None, Variant::Nft, Reason::Configured, legacy),
            (&nothing, None, nft, Variant::Nft, Reason::Remembered, None),
            (&nothing, nft, legacy, Variant::Nft, Reason::Configured, None),
            (&nothing, None, None, Variant::Legacy, Reason::Evidence, None),
        ];
        for (index, (evidence, configured, remembered, chosen, reason, contradiction)) in cases.into_iter().enumerate()
        {
            let decision = Decision::new(evidence.clone(), configured, remembered);
            assert_eq!((decision.chosen, decision.reason), (chosen, reason), "case {index}");
            assert_eq!(decision.contradiction(), contradiction, "case {index}");
        }
    }
}
