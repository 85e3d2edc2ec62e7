//! The xtables lock: somebody who holds it, and somebody who watches who does.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use testkit::netns::{Netns, Process};

/// Time during which one process was seen to hold a lock.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    /// The process.
    pub pid: u32,
    /// When it was first seen.
    pub from: Instant,
    /// When it was last seen.
    pub until: Instant,
}

/// A watcher of one lock, by `/proc/locks`, about twice a millisecond.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Hold>>>,
}

impl Watcher {
    /// Starts to watch.
    ///
    /// # Errors
    ///
    /// If there is no such file.
    pub fn start(lock: &Path) -> Result<Self> {
        let inode = std::fs::metadata(lock)?.ino();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("locks".to_owned()).spawn(move || {
            let mut holds: Vec<Hold> = Vec::new();
            let mut before = None;
            while !stopped.load(Ordering::Relaxed) {
                let now = Instant::now();
                let holder = holder(inode)?;
                match (holder, before, holds.last_mut()) {
                    (Some(pid), Some(same), Some(hold)) if pid == same => hold.until = now,
                    (Some(pid), _, _) => holds.push(Hold { pid, from: now, until: now }),
                    (None, _, _) => {}
                }
                before = holder;
                std::thread::sleep(Duration::from_micros(500));
            }
            Ok(holds)
        })?;
        Ok(Self { stop, thread })
    }

    /// Stops watching and returns who has held the lock, in order.
    ///
    /// # Errors
    ///
    /// If `/proc/locks` could not be read.
    pub fn finish(self) -> Result<Vec<Hold>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the watcher panicked"))?
    }
}

/// Returns who holds the lock on a file now.
///
/// # Errors
///
/// If there is no such file, or `/proc/locks` cannot be read.
pub fn holder_of(lock: &Path) -> Result<Option<u32>> {
    holder(std::fs::metadata(lock)?.ino())
}

/// Returns who holds the lock on the file with this inode number now.
fn holder(inode: u64) -> Result<Option<u32>> {
    // 1: FLOCK  ADVISORY  WRITE 4711 00:1a:5678 0 EOF; who waits has an arrow before the kind.
    let locks = std::fs::read_to_string("/proc/locks")?;
    let tail = format!(":{inode}");
    Ok(locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, _, pid, file, ..] if file.ends_with(&tail) => pid.parse().ok(),
            _ => None,
        }
    }))
}

/// Starts a process that holds the lock for `hold` seconds of every `hold + pause`.
///
/// # Errors
///
/// If it cannot be started.
pub fn hog(netns: &Netns, lock: &Path, hold: u32, pause: u32) -> Result<Process> {
    let script = format!("while flock {} sleep {hold}; do sleep {pause}; done", lock.display());
    netns.spawn(&["sh", "-c", &script])
}

/// Returns the processes that a process has started and that have not ended.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}
