//! Gets a listing of one table that can be believed, by one way or the other (U6.d, U6.e).
//!
//! Fed by [`super::tools`], answers the table driver. The save program is asked first. If what it prints is not
//! complete (it may say that it succeeded and print nothing), a table of the nft variant is read over netlink.
//! Each change of the way is said once, so that a foreign rule which stays costs one line of the log.
//!
//! The save program is asked for all tables at once, because it reads all of them whatever it is asked for. What it
//! printed of the others is kept for those who ask next, but not longer than nf_tables stays as it was.

use std::collections::BTreeMap;
use std::time::Duration;

use model::Family;
use program::Table;
use tracing::info;

use super::native::Native;
use super::parse::{COMPLETION, Judgement, Numbered, incompatible_table, judge};
use super::refusal::essence;
use super::table::TableResponse;
use crate::error::DriverError;

/// How the tables of one family and the nft variant are read.
#[derive(Debug)]
pub(super) struct Listings {
    family: Family,
    native: Native,
    /// What was printed of tables that were not asked for.
    pieces: BTreeMap<Table, String>,
    /// The generation of nf_tables that `pieces` show.
    generation: Option<u32>,
    /// What was last said of a table.
    said: BTreeMap<Table, Said>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    HidesBaseChains,
    ReadOverNetlink,
}

impl Listings {
    /// Allocates; opens nothing.
    pub(super) fn new(family: Family, timeout: Duration) -> Self {
        Self {
            family,
            native: Native::new(family, timeout),
            pieces: BTreeMap::new(),
            generation: None,
            said: BTreeMap::new(),
        }
    }

    /// What is known of a table without asking, if this is the present generation.
    pub(super) fn kept(&mut self, table: Table, generation: Option<u32>) -> Option<TableResponse> {
        if generation.is_none() || generation != self.generation {
            self.pieces.clear();
            self.generation = None;
        }
        self.pieces.remove(&table).map(TableResponse::Done)
    }

    /// Takes what the save program answered about all tables; returns what it says about one of them. `None` if that
    /// is nothing, so that it is to be asked for this one alone.
    pub(super) fn take_apart(&mut self, table: Table, answer: TableResponse) -> Option<TableResponse> {
        self.pieces.clear();
        self.generation = None;
        let output = match answer {
            TableResponse::Done(output) => output,
            TableResponse::Broken(error) => return Some(TableResponse::Broken(error)),
            TableResponse::Refused { .. }
            | TableResponse::Listed(_)
            | TableResponse::Chains(_)
            | TableResponse::NotLoaded => return None,
        };
        self.pieces = pieces(&output);
        match self.pieces.remove(&table) {
            Some(piece) => Some(TableResponse::Done(piece)),
            // Silence proves nothing; that the kernel has not got the table does.
            None if self.native.tables().is_ok_and(|tables| !tables.contains(table.as_str())) => {
                Some(TableResponse::NotLoaded)
            }
            None => None,
        }
    }

    /// What was taken apart last shows this generation; `None` if it shows none.
    pub(super) fn keep(&mut self, generation: Option<u32>) {
        self.generation = generation;
        if generation.is_none() {
            self.pieces.clear();
        }
    }

    /// Takes what the save program answered and puts something better in its place if it is not complete.
    pub(super) fn settle(&mut self, table: Table, answer: TableResponse) -> TableResponse {
        let reason = match &answer {
            TableResponse::Done(output) => match judge(table, output) {
                Judgement::Complete { hides_base_chains } => {
                    self.say(table, hides_base_chains.then_some(Said::HidesBaseChains), "");
                    return answer;
                }
                Judgement::Incompatible => "it holds rules that the program cannot represent".to_owned(),
                Judgement::CutOff => "the program printed no complete listing".to_owned(),
            },
            TableResponse::Refused { status, stderr, .. } => format!("status {status}: {}", essence(stderr)),
            TableResponse::Broken(error) => error.full_text(),
            TableResponse::Listed(_) | TableResponse::Chains(_) | TableResponse::NotLoaded => return answer,
        };
        match self.native.view(table) {
            Ok(view) => {
                self.say(table, Some(Said::ReadOverNetlink), &reason);
                TableResponse::Listed(view)
            }
            // The program's own failure says more.
            Err(source) => {
                info!(table = label(self.family, table), error = %source, "cannot be read over netlink either");
                answer
            }
        }
    }

    /// Removes rules of a table by number, all or none.
    pub(super) fn remove(&mut self, table: Table, rules: &[Numbered]) -> TableResponse {
        let rule = |rule: &Numbered| super::native::Removal::Rule {
            table: table.as_str().into(),
            chain: rule.chain.clone(),
            handle: rule.handle,
        };
        let removals: Vec<_> = rules.iter().map(rule).collect();
        match self.native.remove(&removals) {
            Ok(()) => {
                let table = label(self.family, table);
                info!(table, rules = removals.len(), "removed stale rules of ours over netlink");
                TableResponse::Done(String::new())
            }
            Err(source) => {
                TableResponse::Broken(DriverError::Netlink { request: "removal of stale rules".to_owned(), source })
            }
        }
    }

    fn say(&mut self, table: Table, what: Option<Said>, reason: &str) {
        let before = match what {
            Some(said) => self.said.insert(table, said),
            None => self.said.remove(&table),
        };
        if before == what {
            return;
        }
        let table = label(self.family, table);
        match what {
            Some(Said::HidesBaseChains) => {
                info!(table, "the table has base chains of others beside the standard ones, they are left alone");
            }
            Some(Said::ReadOverNetlink) => info!(table, reason, "the table is read over netlink"),
            None => info!(table, "the table is listed by the save program again"),
        }
    }
}

fn label(family: Family, table: Table) -> String {
    super::table::label(program::TableId { family, table })
}

/// Cuts what the save program prints of all tables into what it prints of each.
fn pieces(output: &str) -> BTreeMap<Table, String> {
    let by_name = |name: &str| Table::ALL.into_iter().find(|table| table.as_str() == name);
    let mut pieces = BTreeMap::new();
    let mut keep = |table: Option<Table>, piece: Option<&str>| {
        if let (Some(table), Some(piece)) = (table, piece) {
            pieces.insert(table, piece.to_owned());
        }
    };
    // Where the present piece begins; what comes before a header belongs to it.
    let (mut start, mut at) = (0, 0);
    let mut table = None;
    for line in output.split_inclusive('\n') {
        let end = at + line.len();
        if let Some(name) = line.strip_prefix('*') {
            if table.is_some() {
                keep(table, output.get(start..at));
                start = at;
            }
            table = by_name(name.trim_end());
        } else if line.starts_with(COMPLETION) {
            keep(table.take(), output.get(start..end));
            start = end;
        } else if let Some(name) = incompatible_table(line) {
            keep(by_name(name), Some(line));
            start = end;
        }
        at = end;
    }
    keep(table, output.get(start..));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(table: &str) -> String {
        format!(
            "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Sat Nov 21 19:00:09 2026\n*{table}\n\
             :OUTPUT ACCEPT [0:0]\n-A OUTPUT -m comment --comment \"# Completed on *nat\" -j ACCEPT\nCOMMIT\n\
             # Completed on Sat Nov 21 19:00:09 2026\n"
        )
    }

    #[test]
    fn a_listing_of_all_tables_is_cut_into_those_of_each() {
        let hidden = "# Table `mangle' contains incompatible base-chains, use 'nft' tool to list them.\n";
        let incompatible = "# Table `nat' is incompatible, use 'nft' tool.\n";
        let foreign = listing("security");
        let (raw, mangle, filter) = (listing("raw"), format!("{hidden}{}", listing("mangle")), listing("filter"));
        let cut = pieces(&[raw.as_str(), &mangle, incompatible, &foreign, &filter].concat());
        let expected = [
            (Table::Raw, raw.clone()),
            (Table::Mangle, mangle.clone()),
            (Table::Nat, incompatible.to_owned()),
            (Table::Filter, filter),
        ];
        assert_eq!(cut, BTreeMap::from(expected));
        for (table, piece) in &cut {
            let complete = matches!(judge(*table, piece), Judgement::Complete { .. });
            assert_eq!(complete, *table != Table::Nat, "{piece}");
        }
    }

    #[test]
    fn what_is_cut_off_is_not_completed_by_what_follows() {
        let whole = listing("raw");
        let cut_off = whole.split_inclusive('\n').take(4).collect::<String>();
        let found = pieces(&format!("{cut_off}{}", listing("nat")));
        // The line that announces the next table is with the former.
        assert!(found[&Table::Raw].starts_with(&cut_off));
        assert_eq!(judge(Table::Raw, &found[&Table::Raw]), Judgement::CutOff);
        let found = pieces(&format!("{}{cut_off}", listing("nat")));
        assert_eq!(judge(Table::Raw, &found[&Table::Raw]), Judgement::CutOff);
        assert_eq!(found[&Table::Nat], listing("nat"));
        assert_eq!(pieces(""), BTreeMap::new());
    }

    #[test]
    fn what_is_kept_serves_once_and_only_its_generation() {
        let mut listings = Listings::new(Family::V4, Duration::from_secs(1));
        let output = [listing("raw"), listing("nat"), listing("filter")].concat();
        let text = |answer: Option<TableResponse>| match answer {
            Some(TableResponse::Done(text)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(text(listings.take_apart(Table::Raw, TableResponse::Done(output.clone()))), listing("raw"));
        listings.keep(Some(7));
        assert_eq!(text(listings.kept(Table::Nat, Some(7))), listing("nat"));
        assert!(listings.kept(Table::Nat, Some(7)).is_none());
        assert!(listings.kept(Table::Filter, Some(8)).is_none());
        assert!(listings.kept(Table::Filter, Some(7)).is_none());
        listings.take_apart(Table::Raw, TableResponse::Done(output)).unwrap();
        listings.keep(None);
        assert!(listings.kept(Table::Filter, None).is_none());
    }
}
