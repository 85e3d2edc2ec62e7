//! Removes what is ours from the tables of the variant that is not in use (netfilter.md 16.9).
//!
//! Fed by [`super::backend`]. The nft variant is read and swept over netlink: one transaction for each table, and if
//! something foreign holds on to a chain, whatever can go goes. The legacy variant is left to ordinary table drivers
//! with nothing desired.

use std::io;

use model::Family;
use program::Table;
use tracing::info;

use super::native::{Native, Removal};
use super::parse::{Entry, View, parse};
use super::variant::{Programs, legacy_tables, search_path};
use crate::exec;
use crate::options::{Options, Variant};
use crate::report::DriverReport;

/// The table of the reference's native nftables mode.
const NATIVE_TABLE: &str = "calico";

/// Returns whether one of the family's legacy tables holds something of ours. Makes none.
pub(super) async fn legacy_has_some(family: Family, programs: &Programs, options: &Options) -> bool {
    let loaded = legacy_tables(family).unwrap_or_default();
    for table in Table::ALL.into_iter().filter(|table| loaded.lines().any(|name| name == table.as_str())) {
        let args = ["-t".to_owned(), table.as_str().to_owned()];
        let Ok(finished) = exec::run(&programs.save, &args, "", options.program_timeout).await else { continue };
        // What cannot be read is the table driver's to report.
        if parse(table, &finished.stdout).map_or(true, |view| has_some(&view)) {
            return true;
        }
    }
    false
}

fn has_some(view: &View) -> bool {
    !view.ours.is_empty() || view.shared.values().flatten().any(|entry| *entry != Entry::Foreign)
}

/// Removes what is ours from nf_tables: with `in_use` of the legacy variant from the tables of the nft variant, and
/// always the table of the native mode.
pub(super) async fn sweep_nft(family: Family, in_use: Variant, options: &Options) -> Option<DriverReport> {
    let mut native = Native::new(family, options.netlink_timeout);
    let mut report = DriverReport { driver: format!("nftables/{}", family.digit()), ..DriverReport::default() };
    // A kernel without nf_tables has nothing of ours in it.
    let tables = native.tables().ok()?;
    for table in Table::ALL.into_iter().filter(|table| in_use == Variant::Legacy && tables.contains(table.as_str())) {
        let ancient = if table == Table::Nat { ancient(&mut native, family, options).await } else { Vec::new() };
        if let Err(error) = sweep_table(&mut native, table, ancient, &mut report) {
            report.errors.push(format!("cannot sweep table {} of the nft variant: {error}", table.as_str()));
        }
    }
    if tables.contains(NATIVE_TABLE) {
        match native.remove(&[Removal::Table { table: NATIVE_TABLE.into() }]) {
            Ok(()) => {
                report.writes += 1;
                info!(family = %family, "removed the table of the native nftables mode");
            }
            Err(error) => report.errors.push(format!("cannot remove table {NATIVE_TABLE}: {error}")),
        }
    }
    Some(report)
}

fn sweep_table(native: &mut Native, table: Table, ancient: Vec<Removal>, report: &mut DriverReport) -> io::Result<()> {
    let view = native.view(table)?;
    report.reads += 1;
    let mut removals = ancient;
    removals.extend(removals_of(table, &view));
    if removals.is_empty() {
        return Ok(());
    }
    let Err(refused) = native.remove(&removals) else {
        report.writes += 1;
        info!(table = table.as_str(), removed = removals.len(), "swept a table of the nft variant");
        return Ok(());
    };
    // Something foreign leads to a chain of ours: that one is emptied and stays, the others go.
    for removal in &removals {
        if native.remove(std::slice::from_ref(removal)).is_ok() {
            report.writes += 1;
        }
    }
    let left = native.view(table)?;
    if left != view {
        let chains = left.ours.len();
        info!(table = table.as_str(), chains, "swept a table of the nft variant but for chains that others use");
    }
    let has_rules = left.ours.values().any(|rules| !rules.is_empty());
    if has_rules || left.shared.values().flatten().any(|entry| *entry != Entry::Foreign) {
        Err(refused)
    } else {
        Ok(())
    }
}

/// The rules that agents before 2.0 put straight into POSTROUTING. They have no mark of ours, and the name of a set is
/// not in the kernel's rule: the save program is asked, but only if a rule looks like one of them.
async fn ancient(native: &mut Native, family: Family, options: &Options) -> Vec<Removal> {
    const CHAIN: &str = "POSTROUTING";
    let look = |native: &mut Native| Some((native.generation().ok()?, native.rules("nat", Some(CHAIN)).ok()?));
    let Some((generation, rules)) = look(native) else { return Vec::new() };
    if !rules.iter().any(|rule| rule.masquerades && rule.matches_like_ancient) {
        return Vec::new();
    }
    let Ok(programs) = Programs::find(family, Variant::Nft, &search_path()) else { return Vec::new() };
    let args = ["-t", "nat"].map(str::to_owned);
    let Ok(finished) = exec::run(&programs.save, &args, "", options.program_timeout).await else { return Vec::new() };
    let Ok(view) = parse(Table::Nat, &finished.stdout) else { return Vec::new() };
    let entries = view.shared.get(CHAIN).map(Vec::as_slice).unwrap_or_default();
    // Rule for rule the same chain, or no conclusion.
    if entries.len() != rules.len() || native.generation().ok() != Some(generation) {
        return Vec::new();
    }
    let ours = rules.iter().zip(entries).filter(|(rule, entry)| {
        matches!(entry, Entry::Ours { hash: None, .. }) && rule.masquerades && rule.matches_like_ancient
    });
    ours.map(|(rule, _)| Removal::Rule { table: "nat".into(), chain: CHAIN.into(), handle: rule.handle }).collect()
}

/// Rules in shared chains first, then what chains refer to, then the chains.
fn removals_of(table: Table, view: &View) -> Vec<Removal> {
    let name: Box<str> = table.as_str().into();
    let hooks = view.shared.iter().flat_map(|(chain, entries)| {
        entries.iter().filter_map(|entry| match entry {
            Entry::Numbered { handle, .. } => {
                Some(Removal::Rule { table: name.clone(), chain: chain.clone(), handle: *handle })
            }
            Entry::Foreign | Entry::Ours { .. } => None,
        })
    });
    let filled = view.ours.iter().filter(|(_, rules)| !rules.is_empty());
    let rules = filled.map(|(chain, _)| Removal::Rules { table: name.clone(), chain: chain.clone() });
    let chains = view.ours.keys().map(|chain| Removal::Chain { table: name.clone(), chain: chain.clone() });
    hooks.chain(rules).chain(chains).collect()
}
