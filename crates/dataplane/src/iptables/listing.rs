//! Gets a listing of one table that can be believed, by one way or the other (U6.d, U6.e).
//!
//! Fed by [`super::tools`], answers the table driver. The save program is asked first. If what it prints is not
//! complete (it may say that it succeeded and print nothing), a table of the nft variant is read over netlink.
//! Each change of the way is said once, so that a foreign rule which stays costs one line of the log.

use std::collections::BTreeMap;
use std::time::Duration;

use model::Family;
use program::Table;
use tracing::info;

use super::native::Native;
use super::parse::{Judgement, Numbered, judge};
use super::refusal::essence;
use super::table::TableResponse;
use crate::error::DriverError;

/// How the tables of one family and the nft variant are read.
#[derive(Debug)]
pub(super) struct Listings {
    family: Family,
    native: Native,
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
        Self { family, native: Native::new(family, timeout), said: BTreeMap::new() }
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
