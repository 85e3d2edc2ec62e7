//! Performs the requests of the table drivers of one family, one at a time.
//!
//! Fed with [`TableRequest`]s by the apply loop. Restore programs are started once and held open: a
//! transaction then costs a tenth to a hundredth of a process start (performance.md 4.4). That a held-open
//! program acts at each `COMMIT`, acknowledges it and ends at an error is tried at the start in a network
//! namespace of its own, because it is nowhere promised; if it does not, or ever surprises us, each
//! transaction gets a process of its own.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use model::Family;
use nix::sched::{CloneFlags, unshare};
use program::Table;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::backend::TableTransport;
use super::features::{Features, Overrides};
use super::listing::Listings;
use super::lock::{Guard, LockFigures, XtablesLock};
use super::table::{ForeignChange, TableRequest, TableResponse};
use super::variant::{self, Programs, legacy_tables};
use super::watch::Watch;
use crate::error::DriverError;
use crate::exec::{self, Fate, HeldOpen, Identity, Patience};
use crate::options::{Options, Variant};

/// How long a restore program waits for the xtables lock, in seconds (netfilter.md 16.5).
const LOCK_WAIT: u32 = 10;

/// A held-open program of the legacy variant is not used any more after this. It sets itself an alarm for [`LOCK_WAIT`]
/// when it takes the lock and never takes it back: when it rings, the program takes that for the end of its input and
/// ends, perhaps just when the next transaction arrives (1.8.9).
const MOST_IDLE: Duration = Duration::from_secs(LOCK_WAIT as u64 - 2);

/// A held-open program that keeps more than this after a transaction that was itself large is started anew.
const MOST_MEMORY: u64 = 32 << 20;
const LARGE_INPUT: usize = 256 * 1024;

/// A listing that somebody's transaction came into is made again until there were so many.
const LISTINGS: u32 = 3;

/// Programs are not held open any more after so many have misbehaved in a row: one may have been killed by somebody.
const SURPRISES: u32 = 3;

/// How long a step of the self-test may take.
const SELF_TEST_LIMIT: Duration = Duration::from_secs(5);

/// The programs of one family and variant, and the one that is held open.
#[derive(Debug)]
pub struct TableTools {
    family: Family,
    programs: Programs,
    variant: Variant,
    restore_args: Vec<String>,
    lock_probe: Duration,
    lock: XtablesLock,
    /// The programs must be given the lock.
    takes_no_lock: bool,
    patience: Patience,
    watch: Watch,
    figures: LockFigures,
    hold: Hold,
    /// Times in a row that a held-open program did what it must not.
    surprises: u32,
    /// The build of the restore program that was asked what it can do.
    identity: Option<Identity>,
    /// Of the nft variant: reads what the save program cannot.
    listings: Option<Listings>,
    overrides: Overrides,
}

impl TableTransport for TableTools {
    fn perform<'a>(&'a mut self, request: &'a TableRequest) -> BoxFuture<'a, TableResponse> {
        self.answer(request).boxed()
    }

    fn foreign_changes(&mut self) -> Vec<ForeignChange> {
        self.watch.foreign_changes()
    }

    fn foreign_change(&mut self) -> BoxFuture<'_, ()> {
        self.watch.foreign_change().boxed()
    }

    fn is_unchanged(&mut self, table: Table) -> BoxFuture<'_, bool> {
        self.watch.is_unchanged(table).boxed()
    }

    fn take_lock_figures(&mut self) -> LockFigures {
        std::mem::take(&mut self.figures)
    }

    fn cpu_time(&self) -> Duration {
        children_cpu_time()
    }

    fn changed_features(&mut self) -> BoxFuture<'_, Option<Features>> {
        self.ask_if_replaced().boxed()
    }

    fn try_to_hold_open(&mut self) -> BoxFuture<'_, ()> {
        self.test_holding().boxed()
    }
}

#[derive(Debug)]
enum Hold {
    /// A process for each transaction.
    Off,
    /// To be started with the next transaction.
    Ready,
    Open(Box<HeldOpen>),
}

impl TableTools {
    /// Allocates; starts nothing.
    pub fn new(
        family: Family,
        variant: Variant,
        programs: Programs,
        features: &Features,
        lock: XtablesLock,
        options: &Options,
    ) -> Self {
        let identity = Identity::of(&programs.restore);
        let restore_args = restore_args(features, options.lock_probe);
        let patience = Patience { limit: options.program_timeout, progress: options.progress.clone() };
        let watch = Watch::new(family, variant, lock.clone(), options.netlink_timeout);
        Self {
            family,
            programs,
            variant,
            restore_args,
            lock_probe: options.lock_probe,
            lock,
            takes_no_lock: !features.restore_supports_lock,
            patience,
            watch,
            figures: LockFigures::default(),
            hold: Hold::Off,
            surprises: 0,
            identity,
            listings: None,
            overrides: options.features,
        }
    }

    /// Reads tables over netlink where the save program cannot; for the nft variant.
    #[must_use]
    pub fn reading_over_netlink(self, timeout: Duration) -> Self {
        Self { listings: Some(Listings::new(self.family, timeout)), ..self }
    }

    async fn ask_if_replaced(&mut self) -> Option<Features> {
        let identity = Identity::of(&self.programs.restore);
        if identity.is_none() || identity == self.identity {
            return None;
        }
        let program = self.programs.restore.display();
        match variant::probe(&self.programs, &self.overrides, self.patience.limit).await {
            Ok((_, features)) => {
                info!(%program, ?features, "program was replaced");
                self.identity = identity;
                self.restore_args = restore_args(&features, self.lock_probe);
                self.takes_no_lock = !features.restore_supports_lock;
                Some(features)
            }
            Err(error) => {
                warn!(%program, error = error.full_text(), "program was replaced and does not answer");
                None
            }
        }
    }

    async fn test_holding(&mut self) {
        self.hold = match self_test(&self.programs, &self.restore_args).await {
            Ok(()) => Hold::Ready,
            Err(reason) => {
                let program = self.programs.restore.display();
                warn!(%program, reason, "cannot be held open, starting it for each transaction");
                Hold::Off
            }
        };
    }

    /// Returns whether transactions go to a held-open program.
    pub fn holds_open(&self) -> bool {
        !matches!(self.hold, Hold::Off)
    }

    async fn answer(&mut self, request: &TableRequest) -> TableResponse {
        self.watch.open();
        match request {
            TableRequest::Save { table, if_loaded: true } if !self.is_loaded(*table) => TableResponse::NotLoaded,
            TableRequest::Save { table, .. } => self.save(*table).await,
            TableRequest::Chains { table, names } => match self.watch.read_chains(*table, names) {
                Some(chains) => chains,
                None => self.save(*table).await,
            },
            TableRequest::Restore(input) => self.restore(input).await,
            TableRequest::Remove { table, rules } => match &mut self.listings {
                Some(listings) => listings.remove(*table, rules),
                // Nothing but a look over netlink finds such rules.
                None => TableResponse::Done(String::new()),
            },
        }
    }

    fn is_loaded(&self, table: Table) -> bool {
        legacy_tables(self.family).is_some_and(|names| names.lines().any(|name| name == table.as_str()))
    }

    async fn save(&mut self, table: Table) -> TableResponse {
        let Self { programs, patience, watch, listings, .. } = self;
        let program = &programs.save;
        let Some(listings) = listings else {
            watch.before_read(table).await;
            let answer = list(program, Some(table), patience).await;
            watch.after_read(table, None, matches!(answer, TableResponse::Done(_)));
            return answer;
        };
        let mut attempt = 1;
        loop {
            let generation = watch.before_read(table).await;
            let mut answer = listings.kept(table, generation);
            if answer.is_none() {
                // With `-t` the program reads as much from the kernel, so all tables at once cost as much as one.
                answer = listings.take_apart(table, list(program, None, patience).await);
            }
            let answer = match answer {
                Some(answer) => answer,
                None => list(program, Some(table), patience).await,
            };
            let answer = listings.settle(table, answer);
            let is_listed = !matches!(answer, TableResponse::Refused { .. } | TableResponse::Broken(_));
            let is_undisturbed = watch.after_read(table, generation, is_listed);
            listings.keep(generation.filter(|_| is_undisturbed));
            // Programs that are disturbed print rules twice (1.8.9).
            if is_undisturbed || attempt == LISTINGS {
                return answer;
            }
            attempt += 1;
        }
    }

    /// Writes, with or for the lock, and takes note of both.
    async fn restore(&mut self, input: &str) -> TableResponse {
        self.watch.before_write(input);
        let lock = self.lock.clone();
        let table = input.lines().next().unwrap_or_default().trim_start_matches('*').to_owned();
        let response = if self.variant == Variant::Nft {
            self.transact(input).await
        } else {
            let mut wait = lock.wait();
            let guard: Result<Option<Guard>, ()> = if self.takes_no_lock {
                let limit = Duration::from_secs(LOCK_WAIT.into());
                wait.take(limit, &table).await.map(Some).ok_or(())
            } else {
                Ok(None)
            };
            let response = match guard {
                Ok(_guard) => tokio::select! {
                    response = self.transact(input) => response,
                    never = wait.look(&table) => match never {},
                },
                // What the programs say when they give up waiting.
                Err(()) => TableResponse::Refused {
                    program: self.programs.restore.display().to_string(),
                    status: 4,
                    stderr: "Another app is currently holding the xtables lock.\n".to_owned(),
                    lines_before: 0,
                },
            };
            let gave_up = matches!(&response, TableResponse::Refused { status: 4, .. });
            self.figures.add(wait.end(!gave_up));
            response
        };
        if matches!(response, TableResponse::Done(_)) {
            self.patience.progress.commits(1);
        }
        self.watch.after_write(input);
        response
    }

    async fn transact(&mut self, input: &str) -> TableResponse {
        if matches!(self.hold, Hold::Off) {
            return self.restore_once(input).await;
        }
        let Some(mut held) = self.take_held().await else { return self.restore_once(input).await };
        let pid = held.pid();
        if let Some(pid) = pid {
            self.lock.is_ours(pid, true);
            self.watch.is_ours(pid);
        }
        let fate = held.transact(input, &self.patience).await;
        if let (Some(pid), false) = (pid, matches!(fate, Ok(Fate::Acknowledged))) {
            self.lock.is_ours(pid, false);
        }
        match fate {
            Ok(Fate::Acknowledged) => {
                self.surprises = 0;
                self.keep(held, input.len()).await;
                TableResponse::Done(String::new())
            }
            Ok(Fate::Ended { status, stderr, lines_before }) if status != 0 => {
                self.hold = Hold::Ready;
                let program = self.programs.restore.display().to_string();
                TableResponse::Refused { program, status, stderr, lines_before }
            }
            Ok(Fate::Ended { .. }) => self.surprised(DriverError::Lost {
                program: self.programs.restore.display().to_string(),
                source: std::io::Error::other("it ended without an error and without an acknowledgement"),
            }),
            Err(error) => self.surprised(error),
        }
    }

    /// Keeps the program for the next transaction, unless it has become fat.
    async fn keep(&mut self, held: HeldOpen, length: usize) {
        if length >= LARGE_INPUT && held.resident().is_some_and(|bytes| bytes > MOST_MEMORY) {
            debug!(bytes = held.resident(), "restore program keeps much memory, it is started anew");
            self.end(held).await;
            self.hold = Hold::Ready;
        } else {
            self.hold = Hold::Open(Box::new(held));
        }
    }

    /// Waits for the end, so that there is never more than one.
    async fn end(&mut self, held: HeldOpen) {
        let pid = held.pid();
        held.end().await;
        if let Some(pid) = pid {
            self.lock.is_ours(pid, false);
        }
    }

    /// Returns the program that is held open, or a new one.
    async fn take_held(&mut self) -> Option<HeldOpen> {
        if let Hold::Open(mut held) = std::mem::replace(&mut self.hold, Hold::Ready) {
            let rings_soon = self.variant == Variant::Legacy && held.idle_for() >= MOST_IDLE;
            if !rings_soon && held.is_usable() {
                return Some(*held);
            }
            self.end(*held).await;
        }
        let variables = self.lock.variable();
        match HeldOpen::start_with(&self.programs.restore, &self.restore_args, variables.as_slice()) {
            Ok(held) => Some(held),
            Err(error) => {
                // Perhaps it is being replaced; a start for this transaction tells what is the matter.
                debug!(%error, "restore program cannot be held open this time");
                None
            }
        }
    }

    /// Stops holding programs open if that goes wrong again and again, or takes for ever.
    fn surprised(&mut self, error: DriverError) -> TableResponse {
        self.surprises += 1;
        if self.surprises < SURPRISES && !matches!(error, DriverError::Timeout { .. }) {
            info!(%error, "held-open restore program misbehaved, starting another");
            self.hold = Hold::Ready;
        } else {
            warn!(%error, "held-open restore program misbehaved, starting it for each transaction from here on");
            self.hold = Hold::Off;
        }
        TableResponse::Broken(error)
    }

    async fn restore_once(&mut self, input: &str) -> TableResponse {
        let Self { lock, watch, programs, restore_args, patience, .. } = self;
        let variables = lock.variable();
        let mut ours = None;
        let started = |pid| {
            lock.is_ours(pid, true);
            watch.is_ours(pid);
            ours = Some(pid);
        };
        let restore = &programs.restore;
        let finished = exec::run_with(restore, restore_args, input, variables.as_slice(), patience, started).await;
        if let Some(pid) = ours {
            lock.is_ours(pid, false);
        }
        response(restore, finished)
    }
}

/// Processor time of all programs that were started and have ended.
fn children_cpu_time() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    let used = getrusage(UsageWho::RUSAGE_CHILDREN).map(|usage| usage.user_time() + usage.system_time());
    let micros = used.map(|time| time.num_microseconds()).unwrap_or_default();
    Duration::from_micros(u64::try_from(micros).unwrap_or_default())
}

fn restore_args(features: &Features, lock_probe: Duration) -> Vec<String> {
    let mut args = vec!["--noflush".to_owned(), "--verbose".to_owned()];
    if features.restore_supports_lock {
        let wait = ["--wait".to_owned(), LOCK_WAIT.to_string()];
        let interval = ["--wait-interval".to_owned(), lock_probe.as_micros().to_string()];
        args.extend(wait.into_iter().chain(interval));
    }
    args
}

/// Asks the save program for one table, or for all that there are.
async fn list(program: &Path, table: Option<Table>, patience: &Patience) -> TableResponse {
    let args = table.map_or_else(Vec::new, |table| vec!["-t".to_owned(), table.as_str().to_owned()]);
    response(program, exec::run_with(program, &args, "", &[], patience, |_| {}).await)
}

fn response(program: &Path, finished: Result<exec::Finished, DriverError>) -> TableResponse {
    match finished {
        Ok(finished) if finished.status == 0 => TableResponse::Done(finished.stdout),
        Ok(finished) => TableResponse::Refused {
            program: program.display().to_string(),
            status: finished.status,
            stderr: finished.stderr,
            lines_before: 0,
        },
        Err(error) => TableResponse::Broken(error),
    }
}

/// Tries a held-open program on a thread in a network namespace of its own, which ends with the thread.
async fn self_test(programs: &Programs, restore_args: &[String]) -> Result<(), String> {
    let (programs, restore_args) = (programs.clone(), restore_args.to_vec());
    let (tell, told) = oneshot::channel();
    let work = move || {
        // Nobody listens any more if the apply loop was dropped.
        tell.send(self_test_here(&programs, &restore_args)).ok();
    };
    std::thread::Builder::new()
        .name("restore-test".to_owned())
        .spawn(work)
        .map_err(|error| format!("no thread for the self-test: {error}"))?;
    told.await.unwrap_or_else(|_| Err("the self-test ended early".to_owned()))
}

fn self_test_here(programs: &Programs, restore_args: &[String]) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("no scratch network namespace: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime for the self-test: {error}"))?;
    runtime.block_on(async {
        let text = |error: DriverError| error.to_string();
        let patience = Patience { limit: SELF_TEST_LIMIT, progress: crate::Progress::default() };
        // A namespace of its own needs no lock against others, and whoever holds the host's for long must not make
        // the test fail. Programs that do not know the variable wait for the host's all the same.
        let variables = [("XTABLES_LOCKFILE", OsStr::new("/dev/null"))];
        let mut held = HeldOpen::start_with(&programs.restore, restore_args, &variables).map_err(text)?;
        let make = "*filter\n:cali-self-test - -\n-A cali-self-test -j DROP\nCOMMIT\n";
        match held.transact(make, &patience).await.map_err(text)? {
            Fate::Acknowledged => {}
            Fate::Ended { stderr, .. } => return Err(format!("refuses a harmless transaction: {}", stderr.trim())),
        }
        let list = ["-t".to_owned(), "filter".to_owned()];
        let seen = exec::run(&programs.save, &list, "", SELF_TEST_LIMIT).await.map_err(text)?;
        if !seen.stdout.contains("-A cali-self-test -j DROP") {
            return Err("acknowledges before the kernel has it".to_owned());
        }
        // The second transaction of one process, and one that must fail.
        match held.transact("*filter\n:cali-self-test - -\nCOMMIT\n", &patience).await.map_err(text)? {
            Fate::Acknowledged => {}
            Fate::Ended { stderr, .. } => return Err(format!("takes one transaction only: {}", stderr.trim())),
        }
        let bad = "*filter\n-D cali-self-test -j ACCEPT\nCOMMIT\n";
        match held.transact(bad, &patience).await.map_err(text)? {
            Fate::Ended { status, .. } if status != 0 => Ok(()),
            Fate::Ended { .. } => Err("ends without a word at an error".to_owned()),
            Fate::Acknowledged => Err("acknowledges an impossible transaction".to_owned()),
        }
    })
}
