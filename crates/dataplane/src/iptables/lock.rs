//! The xtables lock: who holds it, how long we wait for it and hold it (netfilter.md 18.3; U2.a, U2.b).
//!
//! Used by [`super::tools`] of both families. Programs that know `--wait` take the lock themselves; for the others it
//! is taken here. The nft variant needs none. Invariant: one warning per episode of waiting, however many attempts
//! and families it lasts.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use tracing::{info, warn};

use crate::clock;

/// Where programs look for the lock unless they are told otherwise.
pub const USUAL_PATH: &str = "/run/xtables.lock";

/// How often it is looked who holds the lock.
const LOOK: Duration = Duration::from_millis(100);

/// Waiting is worth a word after this.
const WORTH_A_WORD: Duration = Duration::from_secs(1);

/// See the [module documentation](self). Clones share everything.
#[derive(Clone, Debug)]
pub struct XtablesLock {
    path: PathBuf,
    probe: Duration,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// When waiting began, unless nobody waits.
    since: Option<Instant>,
    said: bool,
    /// Our own programs; they do not count as others.
    own: BTreeSet<u32>,
}

/// What became of the lock in one or more transactions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockFigures {
    /// How long each transaction held the lock, as near as can be told from outside of the program.
    pub held: Vec<Duration>,
    /// How long they waited for it together.
    pub waited: Duration,
}

impl LockFigures {
    /// Adds other figures.
    pub fn add(&mut self, more: Self) {
        let Self { held, waited } = more;
        self.held.extend(held);
        self.waited += waited;
    }
}

/// Somebody who holds the lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// 0 if it is in another PID namespace.
    pub pid: u32,
    /// As `/proc/<pid>/comm` has it.
    pub comm: String,
}

/// The lock, held by this process.
#[derive(Debug)]
pub struct Guard {
    _file: Flock<File>,
    /// Of iptables 1.4.20 and 1.4.21.
    _socket: Option<UnixListener>,
}

/// One transaction's wait.
#[derive(Debug)]
pub(super) struct Wait<'a> {
    lock: &'a XtablesLock,
    began: Instant,
    /// When somebody else was last seen to hold the lock.
    busy: Option<Instant>,
}

impl XtablesLock {
    /// Allocates. `probe` is the pause between own attempts to take the lock.
    pub fn new(path: PathBuf, probe: Duration) -> Self {
        Self { path, probe: probe.max(Duration::from_millis(1)), shared: Arc::default() }
    }

    /// The variable that tells programs where the lock is, if it is not where they look.
    pub(super) fn variable(&self) -> Option<(&'static str, &std::ffi::OsStr)> {
        (self.path.as_os_str() != USUAL_PATH).then_some(("XTABLES_LOCKFILE", self.path.as_os_str()))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A program of ours was started or has ended.
    pub(super) fn is_ours(&self, pid: u32, alive: bool) {
        let own = &mut self.shared().own;
        if alive {
            own.insert(pid)
        } else {
            own.remove(&pid)
        };
    }

    /// Returns who else holds the lock; `None` if nobody does, or one of our own programs.
    pub fn holder(&self) -> Option<Holder> {
        let metadata = std::fs::metadata(&self.path).ok()?;
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        let pid = holder_in(&locks, metadata.dev(), metadata.ino())?;
        if self.shared().own.contains(&pid) || pid == std::process::id() {
            return None;
        }
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(Holder { pid, comm: comm.trim_end().to_owned() })
    }

    /// Begins the wait of one transaction.
    pub(super) fn wait(&self) -> Wait<'_> {
        Wait { lock: self, began: clock::now(), busy: None }
    }

    /// The lock was had: whatever waiting there was is over.
    fn got_it(&self) {
        let mut shared = self.shared();
        let since = shared.since.take();
        if let (true, Some(since)) = (std::mem::take(&mut shared.said), since) {
            let waited_ms = millis(clock::now().saturating_duration_since(since));
            info!(event = "xtables_lock_acquired", waited_ms, "got the xtables lock");
        }
    }

    /// Notes that `holder` has what we want, and says so once.
    fn noted(&self, began: Instant, holder: &Holder, table: &str) {
        let mut shared = self.shared();
        let waited = clock::now().saturating_duration_since(*shared.since.get_or_insert(began));
        if waited >= WORTH_A_WORD && !std::mem::replace(&mut shared.said, true) {
            warn!(
                event = "xtables_lock_wait",
                table,
                waited_ms = millis(waited),
                holder_pid = holder.pid,
                holder_comm = %holder.comm,
                "waiting for the xtables lock, which another process holds"
            );
        }
    }

    /// Tries to take the lock, both the present one and that of iptables 1.4.20.
    fn try_take(&self) -> Option<Guard> {
        let file = File::options().create(true).append(true).open(&self.path).ok()?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
        let name = SocketAddr::from_abstract_name(b"xtables").ok()?;
        match UnixListener::bind_addr(&name) {
            Ok(socket) => Some(Guard { _file: file, _socket: Some(socket) }),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => None,
            Err(_) => Some(Guard { _file: file, _socket: None }),
        }
    }
}

impl Wait<'_> {
    /// Looks again and again who holds the lock. Never ends: to be raced against the transaction.
    pub(super) async fn look(&mut self, table: &str) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(LOOK).await;
            self.look_once(table);
        }
    }

    fn look_once(&mut self, table: &str) {
        if let Some(holder) = self.lock.holder() {
            self.busy = Some(clock::now());
            self.lock.noted(self.began, &holder, table);
        }
    }

    /// Takes the lock for a program that does not do so itself; `None` if that took longer than `limit`.
    pub(super) async fn take(&mut self, limit: Duration, table: &str) -> Option<Guard> {
        let mut looked = self.began;
        loop {
            if let Some(guard) = self.lock.try_take() {
                return Some(guard);
            }
            let now = clock::now();
            self.busy = Some(now);
            if now.saturating_duration_since(self.began) >= limit {
                return None;
            }
            if now.saturating_duration_since(looked) >= LOOK {
                looked = now;
                self.look_once(table);
            }
            tokio::time::sleep(self.lock.probe).await;
        }
    }

    /// The transaction is over. `went_in`: it had the lock, and not only waited for it.
    pub(super) fn end(self, went_in: bool) -> LockFigures {
        let now = clock::now();
        let had_it = self.busy.unwrap_or(self.began);
        if !went_in {
            return LockFigures { held: Vec::new(), waited: now.saturating_duration_since(self.began) };
        }
        self.lock.got_it();
        LockFigures {
            held: vec![now.saturating_duration_since(had_it)],
            waited: had_it.saturating_duration_since(self.began),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Finds the process that holds the `flock` of a file in `/proc/locks`.
fn holder_in(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 811 00:19:1234 0 EOF`; one who waits has `->` before `FLOCK`.
        let mut words = line.split_ascii_whitespace().skip(1);
        let (kind, _, _, pid, place) = (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?);
        (kind == "FLOCK" && place == file).then(|| pid.parse().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKS: &str = "\
        1: FLOCK  ADVISORY  WRITE 811 00:19:1234 0 EOF\n\
        1: -> FLOCK  ADVISORY  WRITE 812 00:19:1234 0 EOF\n\
        2: POSIX  ADVISORY  WRITE 9 00:19:77 0 EOF\n\
        3: FLOCK  ADVISORY  WRITE 813 08:01:77 0 EOF\n";

    #[test]
    fn the_holder_is_found_by_the_file_and_not_those_who_wait() {
        let device = nix::sys::stat::makedev;
        assert_eq!(holder_in(LOCKS, device(0, 0x19), 1234), Some(811));
        assert_eq!(holder_in(LOCKS, device(8, 1), 77), Some(813));
        assert_eq!(holder_in(LOCKS, device(0, 0x19), 77), None);
        assert_eq!(holder_in("", device(0, 0x19), 1234), None);
    }

    #[test]
    fn a_lock_is_taken_once_and_freed_with_its_guard() {
        testkit::kernel_test!();
        // The abstract socket belongs to the network namespace.
        testkit::netns::in_new_netns(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let directory = tempfile::tempdir().unwrap();
                let lock = XtablesLock::new(directory.path().join("lock"), Duration::from_millis(5));
                let mut first = lock.wait();
                let guard = first.take(Duration::ZERO, "filter").await.unwrap();
                assert_eq!(first.end(true).held.len(), 1);
                let mut second = lock.wait();
                assert!(second.take(Duration::from_millis(30), "filter").await.is_none());
                assert!(second.end(false).waited >= Duration::from_millis(30));
                drop(guard);
                let mut third = lock.wait();
                assert!(third.take(Duration::ZERO, "filter").await.is_some());
            });
        });
    }
}
