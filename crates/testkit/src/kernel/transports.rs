//! The drivers' side of the simulated kernel.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use dataplane::conntrack::{self, Walk, WalkError};
use dataplane::ipset::transport::{Contents, Failure, Headers, Listing, Op, SetError, Slice};
use dataplane::iptables::hash::RuleHash;
use dataplane::iptables::parse::is_our_chain;
use dataplane::iptables::{
    self, FamilyTools, Features, ForeignChange, TableRequest, TableResponse, TableTransport, Tools,
};
use dataplane::routes::{Neighbour, News, Reading, RouteOp};
use dataplane::{DriverError, Kernel, Options, ReadRule, Touched, Variant, ipset, routes, sysctl};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, poll_fn};
use model::Family;
use program::{Member, SetName, TableId};

use super::faults::Fault;
use super::rules::Line;
use super::sets::is_ours;
use super::tables::{self, Transaction};
use super::{Changed, SimKernel, State, TableKey};

const EBUSY: i32 = 16;
const ENOBUFS: i32 = 105;

pub(super) fn kernel(kernel: &SimKernel, number: u64, options: &Options) -> Kernel {
    let connection = || Connection { kernel: kernel.clone(), number };
    Kernel {
        sets: Box::new(Sets { connection: connection(), reading: None, surprises: Vec::new() }),
        routes: Box::new(connection()),
        flows: Box::new(Flows { connection: connection(), walk: None }),
        tables: Box::new(Programs { connection: connection(), limit: options.program_timeout }),
        settings: Box::new(connection()),
    }
}

#[derive(Clone, Debug)]
struct Connection {
    kernel: SimKernel,
    number: u64,
}

/// How a step goes.
#[derive(Clone, Copy, Debug)]
struct Step {
    fault: Option<Fault>,
    delay: Duration,
}

impl Connection {
    /// Begins an operation; `None` if the agent is dead.
    fn step(&self, what: &str, is_write: bool) -> Option<Step> {
        let mut state = self.kernel.state();
        if state.connection != self.number {
            return None;
        }
        state.counts.steps += 1;
        state.counts.writes += u64::from(is_write);
        if state.faults.crash() {
            state.note("crash");
            state.die();
            return None;
        }
        if state.faults.foreign() {
            let mut dice = state.faults.dice().clone();
            let word = state.edit(&mut dice);
            *state.faults.dice() = dice;
            if let Some(word) = word {
                state.counts.edits += 1;
                state.note(word);
            }
        }
        let fault = state.faults.fault();
        state.counts.faults += u64::from(fault.is_some());
        let delay = state.faults.delay();
        state.note(what);
        if let Some(fault) = fault {
            state.note(&format!("{fault:?}"));
        }
        Some(Step { fault, delay })
    }

    /// Returns whether the agent's life ends at this point.
    fn dies_here(&self) -> bool {
        let mut state = self.kernel.state();
        if state.connection != self.number {
            return true;
        }
        let dies = state.faults.crash();
        if dies {
            state.note("crash within");
            state.die();
        }
        dies
    }

    fn is_heard(&self) -> bool {
        self.kernel.state().connection == self.number
    }
}

impl State {
    /// The agent is gone; what it asks from now on has no effect.
    pub fn die(&mut self) {
        self.connection += 1;
        self.has_crashed = true;
        if let Some(undertaker) = self.undertaker.take() {
            undertaker.wake();
        }
    }
}

// === sets ===

/// The sets, and where reading one of them bit by bit has come to.
#[derive(Debug)]
struct Sets {
    connection: Connection,
    /// Members that were told.
    reading: Option<(SetName, BTreeSet<Member>)>,
    surprises: Vec<(SetName, u64)>,
}

fn lost() -> SetError {
    SetError::Lost("no answer".to_owned())
}

impl ipset::Transport for Sets {
    fn list(&mut self) -> Result<Listing, SetError> {
        let Step { fault, .. } = self.step("sets", false).ok_or_else(lost)?;
        match fault {
            Some(Fault::Truncated | Fault::Refused) => {
                Ok(Listing { names: self.connection.kernel.state().set_names(false), complete: false })
            }
            Some(_) => Err(lost()),
            None => Ok(Listing { names: self.connection.kernel.state().set_names(true), complete: true }),
        }
    }

    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError> {
        let Step { fault, .. } = self.step("set", false).ok_or_else(lost)?;
        match fault {
            Some(Fault::Truncated) => Ok(self.connection.kernel.state().set_contents(set, false)),
            Some(Fault::Refused) => Err(SetError::Other("out of memory".to_owned())),
            Some(_) => Err(lost()),
            None => Ok(self.connection.kernel.state().set_contents(set, true)),
        }
    }

    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure> {
        for (at, op) in ops.iter().enumerate() {
            let failure = |(done, error)| Failure { op: at, done, error };
            let Some(Step { fault, .. }) = self.step(&format!("{op:?}"), true) else {
                return Err(failure((0, lost())));
            };
            self.note_surprises(op);
            let mut state = self.connection.kernel.state();
            let (Op::Create { name, .. }
            | Op::Add { set: name, .. }
            | Op::Remove { set: name, .. }
            | Op::Swap { set: name, .. }
            | Op::Destroy { set: name }) = op;
            if !is_ours(name.as_str()) {
                state.complain(format!("{op:?} on a set of others"));
            }
            match fault {
                None => {}
                Some(Fault::LostBefore | Fault::Hung) => return Err(failure((0, lost()))),
                Some(Fault::Refused | Fault::LockBusy) => {
                    let error = if matches!(op, Op::Destroy { .. }) {
                        SetError::Busy
                    } else {
                        SetError::Other("out of memory".to_owned())
                    };
                    return Err(failure((0, error)));
                }
                Some(Fault::LostWithin | Fault::Truncated) if matches!(op, Op::Add { .. }) => {
                    let outcome = state.perform_set(op, fault);
                    state.changed(Changed::Set);
                    return outcome.map_err(failure);
                }
                Some(Fault::LostWithin | Fault::Truncated | Fault::LostAfter) => {
                    state.perform_set(op, None).ok();
                    state.changed(Changed::Set);
                    return Err(failure((0, lost())));
                }
            }
            let outcome = state.perform_set(op, None);
            state.changed(Changed::Set);
            outcome.map_err(failure)?;
        }
        Ok(())
    }

    fn headers(&mut self) -> Result<Option<Headers>, SetError> {
        if !self.connection.kernel.state().is_modern {
            return Ok(None);
        }
        let Step { fault, .. } = self.step("headers", false).ok_or_else(lost)?;
        let state = self.connection.kernel.state();
        match fault {
            Some(Fault::Truncated | Fault::Refused) => Ok(Some(state.set_headers(false))),
            Some(_) => Err(lost()),
            None => Ok(Some(state.set_headers(true))),
        }
    }

    fn read_all(&mut self, sets: &BTreeSet<SetName>) -> Result<Option<Vec<(SetName, Contents)>>, SetError> {
        if !self.connection.kernel.state().is_modern {
            return Ok(None);
        }
        let Step { fault, .. } = self.step("all sets", false).ok_or_else(lost)?;
        let state = self.connection.kernel.state();
        match fault {
            Some(Fault::Truncated | Fault::Refused) => Ok(None),
            Some(_) => Err(lost()),
            None => {
                let contents = |name: &SetName| Some((name.clone(), state.set_contents(name, true)?));
                Ok(Some(sets.iter().filter_map(contents).collect()))
            }
        }
    }

    fn read_on(&mut self, set: &SetName, _budget: Duration) -> Result<Slice, SetError> {
        if !self.connection.kernel.state().is_modern {
            return self.read(set).map(Slice::Done);
        }
        let is_begun = self.reading.as_ref().is_some_and(|(reading, _)| reading == set);
        if !is_begun {
            self.stop_reading();
        }
        let Step { fault, .. } = self.step("slice", false).ok_or_else(lost)?;
        if fault.is_some() {
            self.stop_reading();
            return Err(lost());
        }
        let mut state = self.connection.kernel.state();
        let Some(mut contents) = state.set_contents(set, true) else { return Ok(Slice::Done(None)) };
        let told = self.reading.take().map(|(_, told)| told).unwrap_or_default();
        contents.members.retain(|member| !told.contains(member));
        if is_begun || contents.members.len() < 2 {
            state.in_reading = None;
            return Ok(Slice::Done(Some(contents)));
        }
        contents.members.truncate(contents.members.len() / 2);
        state.in_reading = Some(set.as_str().to_owned());
        self.reading = Some((set.clone(), contents.members.iter().copied().collect()));
        Ok(Slice::More(contents.members))
    }

    fn stop_reading(&mut self) {
        if self.reading.take().is_some() && self.connection.is_heard() {
            self.connection.kernel.state().in_reading = None;
        }
    }

    fn surprises(&mut self) -> Vec<(SetName, u64)> {
        std::mem::take(&mut self.surprises)
    }
}

impl Sets {
    fn step(&self, what: &str, is_write: bool) -> Option<Step> {
        let step = self.connection.step(what, is_write)?;
        self.connection.kernel.state().counts.set_faults += u64::from(step.fault.is_some());
        Some(step)
    }

    /// Members that are as wanted before they are written.
    fn note_surprises(&mut self, op: &Op) {
        let state = self.connection.kernel.state();
        let (name, members, should_be) = match op {
            Op::Add { set, members } => (set, members, true),
            Op::Remove { set, members } => (set, members, false),
            Op::Create { .. } | Op::Swap { .. } | Op::Destroy { .. } => return,
        };
        let Some(set) = state.sets.get(name.as_str()).filter(|_| state.is_modern) else { return };
        let count = members.iter().filter(|member| set.members.contains(member) == should_be).count();
        if count > 0 {
            self.surprises.push((name.clone(), count as u64));
        }
    }
}

// === routes ===

fn no_buffers() -> io::Error {
    io::Error::from_raw_os_error(ENOBUFS)
}

impl routes::Transport for Connection {
    fn read(&mut self, family: Family) -> io::Result<Reading> {
        let Step { fault, .. } = self.step("routes", false).ok_or_else(no_buffers)?;
        let state = self.kernel.state();
        let all = state.routes.get(&family).cloned().unwrap_or_default();
        match fault {
            None => Ok(Reading { routes: all, complete: true }),
            Some(Fault::Truncated | Fault::Refused) => {
                Ok(Reading { routes: all.into_iter().step_by(2).collect(), complete: false })
            }
            Some(_) => Err(no_buffers()),
        }
    }

    fn read_neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let Step { fault, .. } = self.step("neighbours", false).ok_or_else(no_buffers)?;
        let state = self.kernel.state();
        match fault {
            None => Ok(state.neighbours.iter().copied().collect()),
            Some(Fault::Truncated) => Ok(state.neighbours.iter().copied().step_by(2).collect()),
            Some(_) => Err(no_buffers()),
        }
    }

    fn perform(&mut self, family: Family, ops: &[RouteOp]) -> io::Result<Vec<Result<(), i32>>> {
        let mut outcomes = Vec::new();
        for op in ops {
            let Step { fault, .. } = self.step(&format!("{op:?}"), true).ok_or_else(no_buffers)?;
            let mut state = self.kernel.state();
            match fault {
                Some(Fault::LostBefore | Fault::Hung) => return Err(no_buffers()),
                Some(Fault::Refused | Fault::LockBusy | Fault::Truncated) => {
                    outcomes.push(Err(EBUSY));
                    continue;
                }
                Some(Fault::LostWithin | Fault::LostAfter) | None => {}
            }
            let outcome = state.perform_route(family, op);
            if outcome.is_ok() {
                state.let_flow(op);
            }
            outcomes.push(outcome);
            state.changed(Changed::Route(family));
            if fault.is_some() {
                return Err(no_buffers());
            }
        }
        Ok(outcomes)
    }

    fn write_neighbours(&mut self, neighbours: &[Neighbour]) -> io::Result<Vec<Result<(), i32>>> {
        let mut outcomes = Vec::new();
        for neighbour in neighbours {
            let Step { fault, .. } = self.step(&format!("{neighbour:?}"), true).ok_or_else(no_buffers)?;
            if matches!(fault, Some(Fault::LostBefore | Fault::Hung | Fault::Refused)) {
                return Err(no_buffers());
            }
            let mut state = self.kernel.state();
            outcomes.push(state.write_neighbour(neighbour));
            state.changed(Changed::Neighbour);
            if fault.is_some() {
                return Err(no_buffers());
            }
        }
        Ok(outcomes)
    }

    fn take_news(&mut self, out: &mut Vec<News>) -> io::Result<bool> {
        if !self.is_heard() {
            return Err(no_buffers());
        }
        let mut state = self.kernel.state();
        if !std::mem::replace(&mut state.is_listened_to, true) {
            state.news.clear();
            out.push(News::Lost);
            return Ok(false);
        }
        out.append(&mut state.news);
        Ok(false)
    }

    fn poll_news(&mut self, context: &mut Context<'_>, out: &mut Vec<News>) -> Poll<io::Result<()>> {
        let mut state = self.kernel.state();
        if state.connection != self.number || !state.is_listened_to {
            return Poll::Pending;
        }
        if state.news.is_empty() {
            state.listener = Some(context.waker().clone());
            return Poll::Pending;
        }
        out.append(&mut state.news);
        Poll::Ready(Ok(()))
    }
}

// === flows ===

/// One walk at a time, which takes a while.
#[derive(Debug)]
struct Flows {
    connection: Connection,
    walk: Option<Running>,
}

#[derive(Debug)]
struct Running {
    end: Pin<Box<tokio::time::Sleep>>,
    fault: Option<Fault>,
    addresses: BTreeSet<IpAddr>,
}

impl conntrack::Transport for Flows {
    fn start(&mut self, addresses: &BTreeSet<IpAddr>) {
        // A dead agent's walk never ends.
        let step = self.connection.step(&format!("walk {addresses:?}"), false);
        self.walk = step.map(|Step { fault, delay }| {
            let end = Box::pin(tokio::time::sleep(delay));
            Running { end, fault, addresses: addresses.clone() }
        });
    }

    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<Result<Walk, WalkError>> {
        let Some(Running { end, fault, addresses }) = &mut self.walk else { return Poll::Pending };
        ready!(end.as_mut().poll(context));
        if !self.connection.is_heard() {
            return Poll::Pending;
        }
        let mut state = self.connection.kernel.state();
        let before = state.flows.len() as u64;
        let outcome = if fault.is_some() {
            Err(WalkError::Failed("no buffers".to_owned()))
        } else {
            state.flows.retain(|address, _| !addresses.contains(address));
            Ok(Walk { seen: before, removed: before - state.flows.len() as u64, took: Duration::ZERO })
        };
        drop(state);
        self.walk = None;
        Poll::Ready(outcome)
    }
}

// === settings ===

impl sysctl::Tree for Connection {
    fn read(&self, setting: &str) -> io::Result<String> {
        self.kernel.state().setting(setting)
    }

    fn write(&mut self, setting: &str, value: &str) -> io::Result<()> {
        let Step { fault, .. } = self.step(setting, false).ok_or_else(no_buffers)?;
        let mut state = self.kernel.state();
        state.counts.settings += 1;
        state.setting(setting)?;
        if fault.is_some() {
            return Err(io::Error::from_raw_os_error(EBUSY));
        }
        state.settings.insert(setting.to_owned(), value.to_owned());
        state.changed(Changed::Setting);
        Ok(())
    }

    fn has(&self, directory: &str) -> bool {
        self.kernel.state().has_directory(directory)
    }
}

// === tables ===

#[derive(Debug)]
struct Programs {
    connection: Connection,
    limit: Duration,
}

/// The tables of one family and variant.
#[derive(Debug)]
struct FamilyConnection {
    connection: Connection,
    variant: Variant,
    family: Family,
    limit: Duration,
}

impl Programs {
    fn tools(&self, variant: Variant, family: Family) -> FamilyTools {
        let Self { connection, limit } = self;
        let transport = FamilyConnection { connection: connection.clone(), variant, family, limit: *limit };
        FamilyTools { family, features: Features::default(), transport: Box::new(transport) }
    }
}

impl iptables::Backend for Programs {
    fn choose<'a>(&'a mut self, options: &'a Options) -> BoxFuture<'a, Result<Tools, DriverError>> {
        async move {
            let Some(Step { fault, delay }) = self.connection.step("choose", false) else { return pending().await };
            tokio::time::sleep(delay).await;
            if fault.is_some() {
                return Err(DriverError::NoProgram { candidates: "iptables-restore".to_owned() });
            }
            let variant = self.connection.kernel.state().variant;
            let families = iptables::backend::families(options).map(|family| self.tools(variant, family)).collect();
            Ok(Tools { variant, families })
        }
        .boxed()
    }

    fn leftovers<'a>(
        &'a mut self,
        family: Family,
        variant: Variant,
        _: &'a Options,
    ) -> BoxFuture<'a, Option<FamilyTools>> {
        async move {
            let Some(Step { fault, delay }) = self.connection.step("leftovers", false) else { return pending().await };
            tokio::time::sleep(delay).await;
            if fault.is_some() {
                return None;
            }
            let state = self.connection.kernel.state();
            let mut of_both = state.tables.iter().filter(|(key, _)| (key.variant, key.family) == (variant, family));
            let ours = of_both.any(|(_, table)| table.chains.keys().any(|chain| is_our_chain(chain)));
            drop(state);
            ours.then(|| self.tools(variant, family))
        }
        .boxed()
    }
}

impl TableTransport for FamilyConnection {
    fn perform<'a>(&'a mut self, request: &'a TableRequest) -> BoxFuture<'a, TableResponse> {
        async move {
            match request {
                TableRequest::Save { table, if_loaded } => self.save(*table, *if_loaded).await,
                TableRequest::Chains { table, names } => self.chains(*table, names).await,
                TableRequest::Restore(input) => self.restore(input).await,
                // Only those are asked for that a listing gave numbers to, and ours give none.
                TableRequest::Remove { .. } => self.refused(1, "no rule has this number"),
            }
        }
        .boxed()
    }

    fn foreign_changes(&mut self) -> Vec<ForeignChange> {
        let mut state = self.connection.kernel.state();
        if state.connection != self.connection.number {
            return Vec::new();
        }
        let of_ours = |key: &TableKey| (key.variant, key.family) == (self.variant, self.family);
        let (told, rest) = std::mem::take(&mut state.table_news).into_iter().partition(|(key, _)| of_ours(key));
        state.table_news = rest;
        let told: Vec<(TableKey, Touched)> = told;
        let change =
            |(key, what): (TableKey, Touched)| ForeignChange { table: key.table, what, by: None, is_doubtful: false };
        told.into_iter().map(change).collect()
    }

    fn foreign_change(&mut self) -> BoxFuture<'_, ()> {
        poll_fn(|context| {
            let mut state = self.connection.kernel.state();
            let of_ours = |key: &TableKey| (key.variant, key.family) == (self.variant, self.family);
            if state.connection == self.connection.number && state.table_news.iter().any(|(key, _)| of_ours(key)) {
                return Poll::Ready(());
            }
            state.table_listeners.push(context.waker().clone());
            Poll::Pending
        })
        .boxed()
    }
}

impl FamilyConnection {
    fn key(&self, table: program::Table) -> TableKey {
        TableKey { variant: self.variant, family: self.family, table }
    }

    fn broken(&self, fault: Fault) -> TableResponse {
        let program = format!("iptables-{}-restore", self.variant.as_str());
        TableResponse::Broken(if fault == Fault::Hung {
            DriverError::Timeout { program, after: self.limit }
        } else {
            DriverError::Lost { program, source: io::Error::other("it was killed") }
        })
    }

    fn refused(&self, status: i32, stderr: impl Into<String>) -> TableResponse {
        let program = format!("iptables-{}-restore", self.variant.as_str());
        TableResponse::Refused { program, status, stderr: stderr.into(), lines_before: 0 }
    }

    async fn save(&self, table: program::Table, if_loaded: bool) -> TableResponse {
        let what = format!("save {:?} {}", self.family, table.as_str());
        let Some(Step { fault, delay }) = self.connection.step(&what, false) else { return pending().await };
        let delay = if fault == Some(Fault::Hung) { self.limit } else { delay };
        tokio::time::sleep(delay).await;
        let mut state = self.connection.kernel.state();
        let contents = state.tables.entry(self.key(table)).or_default();
        if if_loaded && !contents.is_made {
            return TableResponse::NotLoaded;
        }
        if self.variant == Variant::Legacy {
            contents.make(table);
        }
        let mut text = contents.save(self.variant, table);
        match fault {
            None => TableResponse::Done(text),
            Some(Fault::Truncated) => {
                // At a line's end, so that only what is missing tells.
                let half = text[..text.len() / 2].rfind('\n').map_or(0, |at| at + 1);
                text.truncate(half);
                TableResponse::Done(text)
            }
            Some(Fault::Refused) => self.refused(1, "iptables-save: out of memory"),
            Some(Fault::LockBusy) => self.refused(4, "Another app is currently holding the xtables lock."),
            Some(fault) => self.broken(fault),
        }
    }

    async fn chains(&self, table: program::Table, names: &[Box<str>]) -> TableResponse {
        if self.variant == Variant::Legacy || !self.connection.kernel.state().is_modern {
            // As where single chains cannot be read.
            return self.save(table, false).await;
        }
        let Some(Step { fault, delay }) = self.connection.step("chains", false) else { return pending().await };
        tokio::time::sleep(delay).await;
        if let Some(fault) = fault {
            return self.broken(fault);
        }
        let state = self.connection.kernel.state();
        let contents = state.tables.get(&self.key(table));
        let read = |line: &Arc<Line>| ReadRule {
            hash: line.hash.as_deref().and_then(RuleHash::parse),
            is_ours: line.is_ours(),
        };
        let rules = |name: &str| {
            let rules = contents.and_then(|contents| contents.chains.get(name));
            rules.into_iter().flat_map(|rules| rules.iter()).map(read).collect()
        };
        TableResponse::Chains(names.iter().map(|name| rules(name)).collect())
    }

    async fn restore(&self, input: &str) -> TableResponse {
        let Some(Step { fault, delay }) = self.connection.step(input, true) else { return pending().await };
        tokio::time::sleep(delay).await;
        if !self.connection.is_heard() {
            return pending().await;
        }
        match fault {
            None => {}
            // Where rules are refused for good, which ones is known.
            Some(Fault::Refused | Fault::Truncated) if !self.connection.kernel.state().quirks.lacks_icmp => {
                let line = input.lines().count();
                return self.refused(1, format!("iptables-restore: line {line} failed\n"));
            }
            Some(Fault::LockBusy | Fault::Refused | Fault::Truncated) => {
                return self
                    .refused(4, "Another app is currently holding the xtables lock; waited (10s) for it to exit.\n");
            }
            Some(fault @ Fault::LostBefore) => return self.broken(fault),
            Some(Fault::LostWithin | Fault::LostAfter | Fault::Hung) => {}
        }
        let (mut transactions, refusal) = self.attempt(input);
        if matches!(fault, Some(Fault::LostWithin | Fault::Hung)) {
            transactions.truncate(transactions.len() / 2);
        }
        for transaction in transactions {
            self.commit(transaction);
            // The program takes one after the other, and dies with the agent.
            if self.connection.dies_here() {
                return pending().await;
            }
        }
        if fault == Some(Fault::Hung) {
            tokio::time::sleep(self.limit).await;
        }
        match (fault, refusal) {
            (Some(fault), _) => self.broken(fault),
            (None, Some(refusal)) => self.refused(refusal.status, refusal.stderr),
            (None, None) => TableResponse::Done(String::new()),
        }
    }

    fn attempt(&self, input: &str) -> (Vec<Transaction>, Option<tables::Refusal>) {
        let mut state = self.connection.kernel.state();
        let contents = |table| state.tables.get(&self.key(table)).cloned().unwrap_or_default();
        let has_set = |set: &str| state.sets.contains_key(set);
        let quirks =
            tables::Quirks { lacks_icmp: state.quirks.lacks_icmp && self.family == Family::V4, ..state.quirks };
        let answer = tables::restore(self.variant, quirks, input, contents, has_set);
        let missing = |refusal: &tables::Refusal| {
            ["exist", "load target", "No chain"].iter().any(|text| refusal.stderr.contains(text))
        };
        let is_missing = answer.1.as_ref().is_some_and(missing);
        if is_missing && !state.is_tainted {
            let what = answer.1.as_ref().map_or("", |refusal| &refusal.stderr);
            let text = format!("a transaction names a set or chain that is not there: {what}");
            state.complain(text);
        }
        answer
    }

    fn commit(&self, transaction: Transaction) {
        let Transaction { table, after, touched } = transaction;
        let mut state = self.connection.kernel.state();
        let key = self.key(table);
        let before = state.tables.insert(key, after).unwrap_or_default();
        let theirs = |chains: &tables::Chains| {
            let foreign = chains.chains.iter().filter(|(name, _)| !is_our_chain(name));
            let lines =
                foreign.flat_map(|(name, rules)| rules.iter().map(move |rule| (name.clone(), Arc::clone(rule))));
            lines.filter(|(_, rule)| !rule.is_ours()).collect::<Vec<_>>()
        };
        if state.tables.get(&key).is_some_and(|after| theirs(&before) != theirs(after)) {
            state.complain(format!("rules of others in {key:?} changed"));
        }
        if self.variant == state.variant {
            for chain in &touched {
                state.view_chain(TableId { family: self.family, table }, chain);
            }
        }
        state.changed(Changed::Table(key));
    }
}
