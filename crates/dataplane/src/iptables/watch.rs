//! Notices that somebody else changed our tables, without reading them (performance.md 6.4).
//!
//! Used by [`super::tools`]. With the nft variant the kernel tells what was changed and by whom; with the legacy
//! variant it tells how large a table is, which is asked before each write and twice a second and misses a rule that
//! is replaced by another of the same size: that is left to the refresh.
//!
//! A refresh need not list a table that is proven to be as it was: of the nft variant by the numbers of the
//! transactions (see [`super::account`]), of the legacy variant by a fingerprint of all its rules, which the kernel
//! hands out four times faster than the save program prints them.
//!
//! Invariants: only tables that the kernel has are asked about, because asking makes them; what our own programs do
//! is not reported; when it cannot be told, it is. What we wrote ourselves is proven by nothing but a listing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use model::Family;
use program::Table;
use tableinfo::{Asker, TableInfo};
use tracing::{debug, info};

use super::account::Account;
use super::lock::XtablesLock;
use super::native::Native;
use super::table::{ForeignChange, TableResponse};
use super::variant::legacy_tables;
use crate::nftables::{self, Commit, Heard, Monitor, Process, Touched};
use crate::options::Variant;

/// How often the sizes of legacy tables are looked at, so that a repair comes within a second.
const LOOK: Duration = Duration::from_millis(500);

/// Own programs that are remembered after they ended.
const MOST_OWN: usize = 16;

/// Transactions larger than this may drown what others do at the same time.
const LARGE: usize = 256 * 1024;

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) enum Watch {
    Nft(NftWatch),
    Legacy(LegacyWatch),
}

impl Watch {
    pub(super) fn new(family: Family, variant: Variant, lock: XtablesLock, timeout: Duration) -> Self {
        match variant {
            Variant::Nft => Self::Nft(NftWatch {
                family,
                monitor: None,
                given_up: false,
                native: Native::new(family, timeout),
                own: VecDeque::new(),
                pids_are_ours: false,
                expected: 0,
                found: Vec::new(),
                account: Account::default(),
            }),
            Variant::Legacy => Self::Legacy(LegacyWatch {
                family,
                lock,
                asker: None,
                known: BTreeMap::new(),
                found: Vec::new(),
                reading: None,
                listed: BTreeMap::new(),
            }),
        }
    }

    /// Begins to listen. What happened before is not known.
    pub(super) fn open(&mut self) {
        match self {
            Self::Nft(watch) => watch.open(),
            Self::Legacy(_) => {}
        }
    }

    /// A program of ours runs.
    pub(super) fn is_ours(&mut self, pid: u32) {
        if let Self::Nft(watch) = self {
            if watch.own.len() >= MOST_OWN {
                watch.own.pop_front();
            }
            watch.own.push_back(pid);
        }
    }

    /// A table is going to be read. Returns the present generation of nf_tables if that is known.
    pub(super) async fn before_read(&mut self, table: Table) -> Option<u32> {
        match self {
            Self::Nft(watch) => {
                watch.drain(false);
                watch.monitor.as_ref()?;
                watch.native.generation().ok()
            }
            Self::Legacy(watch) => {
                // Most often the first listing is the last for long; it is not worth a fingerprint.
                let again = watch.known.contains_key(&table);
                // What changes from here on may or may not be in the listing, and will be seen as a change.
                watch.reading = if again { watch.fingerprint(table).await.map(|print| (table, print)) } else { None };
                watch.learn(&[table]);
                None
            }
        }
    }

    /// A table was listed, if `is_listed`, and the kernel has it since. Returns whether nf_tables was, as far as can
    /// be told, the same all the time since its generation was `before`.
    pub(super) fn after_read(&mut self, table: Table, before: Option<u32>, is_listed: bool) -> bool {
        match self {
            Self::Nft(watch) => {
                let Some(before) = before else { return true };
                let is_same = watch.native.generation().is_ok_and(|generation| generation == before);
                watch.drain(false);
                if is_same && is_listed {
                    watch.account.listed(table, before);
                }
                is_same
            }
            Self::Legacy(watch) => {
                if !watch.known.contains_key(&table) {
                    watch.learn(&[table]);
                }
                match watch.reading.take() {
                    Some((read, print)) if is_listed && read == table => watch.listed.insert(table, print),
                    Some(_) | None => watch.listed.remove(&table),
                };
                true
            }
        }
    }

    /// Returns whether it is proven that the table is as it was when it was last listed.
    pub(super) async fn is_unchanged(&mut self, table: Table) -> bool {
        match self {
            Self::Nft(watch) => {
                watch.drain(false);
                watch.monitor.is_some()
                    && watch.native.generation().is_ok_and(|generation| watch.account.is_unchanged(table, generation))
            }
            Self::Legacy(watch) => {
                let Some(listed) = watch.listed.get(&table).copied() else { return false };
                watch.fingerprint(table).await == Some(listed)
            }
        }
    }

    /// Something is going to be written.
    pub(super) fn before_write(&mut self, input: &str) {
        let tables = written(input);
        match self {
            Self::Nft(watch) => {
                watch.drain(false);
                watch.expected = input.lines().filter(|line| *line == "COMMIT").count();
                tables.into_iter().for_each(|table| watch.account.touched(table));
            }
            Self::Legacy(watch) => watch.listed.retain(|table, _| !tables.contains(table)),
        }
    }

    /// Something was written, or was not.
    pub(super) fn after_write(&mut self, input: &str) {
        match self {
            Self::Nft(watch) => {
                watch.drain(input.len() >= LARGE);
                watch.expected = 0;
            }
            Self::Legacy(watch) => watch.learn(&written(input)),
        }
    }

    /// Returns what was noticed since this was last asked.
    pub(super) fn foreign_changes(&mut self) -> Vec<ForeignChange> {
        match self {
            Self::Nft(watch) => {
                watch.drain(false);
                std::mem::take(&mut watch.found)
            }
            Self::Legacy(watch) => {
                watch.look();
                std::mem::take(&mut watch.found)
            }
        }
    }

    /// Waits until something was noticed.
    pub(super) async fn foreign_change(&mut self) {
        match self {
            Self::Nft(watch) => watch.wait().await,
            Self::Legacy(watch) => {
                while watch.found.is_empty() {
                    tokio::time::sleep(LOOK).await;
                    watch.look();
                }
            }
        }
    }

    /// Reads single chains; `None` if they cannot be had.
    pub(super) fn read_chains(&mut self, table: Table, names: &[Box<str>]) -> Option<TableResponse> {
        let Self::Nft(watch) = self else { return None };
        let mut read = |name: &str| nftables::read_chain(&mut watch.native, table, name);
        match names.iter().map(|name| read(name)).collect::<Result<Vec<_>, _>>() {
            Ok(chains) => Some(TableResponse::Chains(chains)),
            Err(error) => {
                debug!(%error, "single chains cannot be read, reading the table");
                None
            }
        }
    }
}

/// The tables that an input for the restore program is about.
fn written(input: &str) -> Vec<Table> {
    let names = input.lines().filter_map(|line| line.strip_prefix('*'));
    Table::ALL.into_iter().filter(|table| names.clone().any(|name| name == table.as_str())).collect()
}

#[derive(Debug)]
pub(super) struct NftWatch {
    family: Family,
    monitor: Option<Monitor>,
    given_up: bool,
    native: Native,
    /// Our programs, oldest first.
    own: VecDeque<u32>,
    /// The kernel's process numbers are those that we know our programs by: no PID namespace is between.
    pids_are_ours: bool,
    /// Transactions of ours that are on their way.
    expected: usize,
    found: Vec<ForeignChange>,
    account: Account,
}

impl NftWatch {
    fn open(&mut self) {
        if self.monitor.is_some() || self.given_up {
            return;
        }
        match Monitor::new(self.family) {
            Ok(monitor) => self.monitor = Some(monitor),
            Err(error) => {
                self.given_up = true;
                info!(%error, "nf_tables does not tell of changes; foreign ones are found by the refresh");
            }
        }
    }

    /// Takes what was heard. `drowned`: we have just written more than the socket may hold.
    fn drain(&mut self, drowned: bool) {
        let Some(monitor) = &mut self.monitor else { return };
        let Heard { commits, lost } = monitor.drain();
        for commit in commits {
            self.take(commit);
        }
        if lost {
            debug!(drowned, "notifications of nf_tables were lost");
            self.account.lost();
            let change = |table| ForeignChange { table, what: Touched::All, by: None, is_doubtful: drowned };
            self.found.extend(Table::ALL.map(change));
        }
    }

    fn take(&mut self, Commit { generation, tables, process }: Commit) {
        match generation {
            Some(generation) => self.account.heard(generation, tables.keys().copied()),
            None => self.account.lost(),
        }
        if tables.is_empty() {
            return;
        }
        if self.is_own(process.as_ref()) {
            self.expected = self.expected.saturating_sub(1);
            return;
        }
        let change = |(table, what)| ForeignChange { table, what, by: process.clone(), is_doubtful: false };
        self.found.extend(tables.into_iter().map(change));
    }

    fn is_own(&mut self, process: Option<&Process>) -> bool {
        match process {
            // What we remove over netlink we do with this thread.
            Some(Process { pid, .. }) if self.own.contains(pid) || *pid == this_thread() => {
                self.pids_are_ours = true;
                true
            }
            Some(_) if self.pids_are_ours => false,
            // Old kernels do not tell who it was, and to a PID namespace they tell it in the numbers of another.
            Some(_) | None => self.expected > 0,
        }
    }

    async fn wait(&mut self) {
        while self.found.is_empty() {
            match &mut self.monitor {
                Some(monitor) => monitor.readable().await,
                None => std::future::pending().await,
            }
            self.drain(false);
        }
    }
}

fn this_thread() -> u32 {
    u32::try_from(nix::unistd::gettid().as_raw()).unwrap_or_default()
}

#[derive(Debug)]
pub(super) struct LegacyWatch {
    family: Family,
    lock: XtablesLock,
    asker: Option<Arc<Asker>>,
    /// What the tables were like when we last wrote or read them.
    known: BTreeMap<Table, TableInfo>,
    found: Vec<ForeignChange>,
    /// Fingerprint of the table that is being listed, from before.
    reading: Option<(Table, u64)>,
    /// Fingerprints of the tables when they were listed, as long as we have not written them since.
    listed: BTreeMap<Table, u64>,
}

impl LegacyWatch {
    /// Takes what the tables are like now for right.
    fn learn(&mut self, tables: &[Table]) {
        for (table, info) in self.ask(tables) {
            match info {
                Some(info) => self.known.insert(table, info),
                None => self.known.remove(&table),
            };
        }
    }

    /// Compares what the tables are like with what they were like.
    fn look(&mut self) {
        let tables: Vec<_> = self.known.keys().copied().collect();
        if tables.is_empty() {
            return;
        }
        for (table, info) in self.ask(&tables) {
            if self.known.get(&table) == info.as_ref() {
                continue;
            }
            match info {
                Some(info) => self.known.insert(table, info),
                None => self.known.remove(&table),
            };
            // With luck whoever it was still holds the lock.
            let by = self.lock.holder().map(|holder| Process { pid: holder.pid, name: holder.comm.into() });
            self.found.push(ForeignChange { table, what: Touched::All, by, is_doubtful: false });
        }
    }

    fn ask(&mut self, tables: &[Table]) -> Vec<(Table, Option<TableInfo>)> {
        let listed = legacy_tables(self.family).unwrap_or_default();
        let Some(asker) = self.asker() else { return Vec::new() };
        let ask = |table: Table| has(&listed, table).then(|| asker.ask(table.as_str()).ok()).flatten();
        tables.iter().map(|table| (*table, ask(*table))).collect()
    }

    /// On a thread of its own: a batch that comes meanwhile must not wait for it.
    async fn fingerprint(&mut self, table: Table) -> Option<u64> {
        if !has(&legacy_tables(self.family)?, table) {
            return None;
        }
        let asker = self.asker()?;
        let asked = tokio::task::spawn_blocking(move || asker.fingerprint(table.as_str())).await.ok()?;
        asked.inspect_err(|error| debug!(%error, table = table.as_str(), "no fingerprint of a legacy table")).ok()
    }

    fn asker(&mut self) -> Option<Arc<Asker>> {
        if self.asker.is_none() {
            let opened = Asker::new(self.family == Family::V6);
            self.asker =
                opened.inspect_err(|error| debug!(%error, "legacy tables cannot be asked about")).ok().map(Arc::new);
        }
        self.asker.clone()
    }
}

/// Whether a table is in the kernel's list of those that it has.
fn has(listed: &str, table: Table) -> bool {
    listed.lines().any(|name| name == table.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nft() -> NftWatch {
        let lock = XtablesLock::new("/nowhere".into(), Duration::from_millis(1));
        match Watch::new(Family::V4, Variant::Nft, lock, Duration::from_secs(1)) {
            Watch::Nft(watch) => watch,
            Watch::Legacy(_) => panic!(),
        }
    }

    fn commit(pid: Option<u32>) -> Commit {
        let chains = Touched::Chains(["cali-a".into()].into());
        Commit {
            generation: Some(7),
            tables: BTreeMap::from([(Table::Filter, chains)]),
            process: pid.map(|pid| Process { pid, name: "x".into() }),
        }
    }

    #[test]
    fn what_our_own_programs_do_is_no_news() {
        let mut watch = nft();
        watch.own.push_back(7);
        watch.take(commit(Some(7)));
        assert_eq!(watch.found, []);
        // The kernel's numbers are ours, so that others are others even while we write.
        watch.expected = 1;
        watch.take(commit(Some(8)));
        assert_eq!(watch.found.len(), 1);
        assert_eq!(watch.found[0].by, Some(Process { pid: 8, name: "x".into() }));
    }

    #[test]
    fn where_processes_cannot_be_told_apart_as_many_transactions_as_we_made_are_ours() {
        for process in [None, Some(99)] {
            let mut watch = nft();
            watch.own.push_back(7);
            watch.expected = 2;
            (0..3).for_each(|_| watch.take(commit(process)));
            assert_eq!(watch.found.len(), 1, "{process:?}");
        }
    }
}
