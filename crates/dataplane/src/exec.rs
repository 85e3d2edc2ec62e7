//! Runs programs: one per question, or one that stays and takes many inputs.
//!
//! Fed by [`crate::iptables::tools`]. Has no idea what the programs do. Every wait has a limit, after
//! which the program is killed; a program that is dropped is killed too.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tracing::{info, warn};

use crate::clock;
use crate::error::DriverError;
use crate::progress::Progress;

/// How much of a program's complaints is kept.
const MAX_STDERR: usize = 64 * 1024;

/// What is fed or read between two signs of progress.
const PIECE: usize = 64 * 1024;

/// A program that takes longer is worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(10);

/// How long a program that was told to end may take for it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a program left behind.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; 128 plus the number of the signal that ended it, as shells count.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program to its end, in the C locale, with `input` on its standard input.
///
/// # Errors
///
/// If it cannot be started, cannot be talked to, or has not ended after `limit`. A status other than 0 is
/// no error here.
pub async fn run(program: &Path, args: &[String], input: &str, limit: Duration) -> Result<Finished, DriverError> {
    let patience = Patience { limit, progress: Progress::default() };
    run_with(program, args, input, &[], &patience, |_| {}).await
}

/// How long a program may take, and who is told that it moves.
#[derive(Clone, Debug)]
pub struct Patience {
    /// After this it is killed: long, because a slow program is better than none (U5.c).
    pub limit: Duration,
    pub progress: Progress,
}

impl Patience {
    /// Waits for `work`, with a word in the log if it is slow; `None` if it is too slow.
    async fn with<T>(&self, program: &Path, work: impl Future<Output = T>) -> Option<T> {
        let began = clock::now();
        let mut work = std::pin::pin!(work);
        if let Ok(done) = tokio::time::timeout(WORTH_A_WORD.min(self.limit), &mut work).await {
            return Some(done);
        }
        let rest = self.limit.saturating_sub(WORTH_A_WORD);
        if rest > Duration::ZERO {
            warn!(program = %program.display(), after = ?WORTH_A_WORD, limit = ?self.limit, "program is slow, waiting");
        }
        let done = tokio::time::timeout(rest, work).await.ok()?;
        info!(program = %program.display(), took = ?clock::now().saturating_duration_since(began), "slow program is through");
        Some(done)
    }
}

/// As [`run`], with variables in the program's environment; `started` is told its process.
///
/// # Errors
///
/// As [`run`].
pub async fn run_with(
    program: &Path,
    args: &[String],
    input: &str,
    variables: &[(&str, &OsStr)],
    patience: &Patience,
    started: impl FnOnce(u32),
) -> Result<Finished, DriverError> {
    let progress = &patience.progress;
    let work = async {
        let mut child = spawn(program, args, variables)?;
        child.id().map(started);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (_, stdout, stderr, status) = tokio::join!(
            feed_and_close(stdin, input, progress),
            drain(stdout, progress),
            drain(stderr, progress),
            child.wait()
        );
        let status = status_code(status.map_err(|source| lost(program, source))?);
        progress.chunk();
        Ok(Finished { status, stdout, stderr })
    };
    // The child is killed when the future is dropped.
    let done = patience.with(program, work).await;
    done.unwrap_or_else(|| Err(DriverError::Timeout { program: shown(program), after: patience.limit }))
}

/// Writes the input and closes the pipe. A program that ended early says why with its status.
async fn feed_and_close(stdin: Option<ChildStdin>, input: &str, progress: &Progress) -> io::Result<()> {
    let Some(mut stdin) = stdin else { return Ok(()) };
    feed(&mut stdin, input, progress).await?;
    stdin.shutdown().await
}

async fn feed(stdin: &mut ChildStdin, input: &str, progress: &Progress) -> io::Result<()> {
    for piece in input.as_bytes().chunks(PIECE) {
        stdin.write_all(piece).await?;
        progress.chunk();
    }
    Ok(())
}

async fn drain(pipe: Option<impl tokio::io::AsyncRead + Unpin>, progress: &Progress) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What was read before an error is still worth having; completeness is judged by the reader.
        while let Ok(1..) = (&mut pipe).take(PIECE as u64).read_to_end(&mut bytes).await {
            progress.chunk();
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

fn spawn(program: &Path, args: &[String], variables: &[(&str, &OsStr)]) -> Result<Child, DriverError> {
    Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // An interrupt from the terminal is for us; we end the program when we are done with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| DriverError::Spawn { program: shown(program), source })
}

fn status_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

fn lost(program: &Path, source: io::Error) -> DriverError {
    DriverError::Lost { program: shown(program), source }
}

fn shown(program: &Path) -> String {
    program.display().to_string()
}

/// A program that stays, takes one input after the other, and says when it is through with each: it prints
/// input lines that begin with `#` (`iptables-restore --verbose` does, and flushes), so that a comment after
/// the input is its acknowledgement.
#[derive(Debug)]
pub struct HeldOpen {
    program: PathBuf,
    identity: Option<Identity>,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: Arc<Mutex<Vec<u8>>>,
    stderr_task: tokio::task::JoinHandle<()>,
    lines: u32,
    acknowledged: u64,
    /// When it was last given an input, or started.
    used: Instant,
}

/// What became of an input.
#[derive(Debug)]
pub enum Fate {
    Acknowledged,
    /// The program ended before it was through. `lines_before`: how many lines it had been given before.
    Ended {
        status: i32,
        stderr: String,
        lines_before: u32,
    },
}

/// Tells one build of a program on disk from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    modified: i64,
    length: u64,
}

impl Identity {
    /// Returns `None` if there is no such file.
    pub fn of(program: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = std::fs::metadata(program).ok()?;
        Some(Self { device: metadata.dev(), inode: metadata.ino(), modified: metadata.mtime(), length: metadata.len() })
    }
}

impl HeldOpen {
    /// Starts the program; it inherits the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start(program: &Path, args: &[String]) -> Result<Self, DriverError> {
        Self::start_with(program, args, &[])
    }

    /// As [`Self::start`], with additional variables in the environment.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn start_with(program: &Path, args: &[String], variables: &[(&str, &OsStr)]) -> Result<Self, DriverError> {
        let mut child = spawn(program, args, variables)?;
        let (Some(stdin), Some(stdout), Some(errors)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(lost(program, io::Error::other("no pipes")));
        };
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let stderr_task = tokio::spawn(collect(errors, Arc::clone(&stderr)));
        Ok(Self {
            program: program.to_owned(),
            identity: Identity::of(program),
            child,
            stdin,
            stdout: BufReader::new(stdout),
            stderr,
            stderr_task,
            lines: 0,
            acknowledged: 0,
            used: clock::now(),
        })
    }

    /// Returns whether the program still runs and is the one on disk.
    pub fn is_usable(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None)) && self.identity == Identity::of(&self.program)
    }

    /// Returns for how long it was given nothing.
    pub fn idle_for(&self) -> Duration {
        clock::now().saturating_duration_since(self.used)
    }

    /// Returns the program's process.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Returns how much memory the program has, in bytes; `None` if that cannot be told.
    pub fn resident(&self) -> Option<u64> {
        const PAGE: u64 = 4096;
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid()?)).ok()?;
        Some(statm.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()? * PAGE)
    }

    /// Lets the program end, and returns when it has.
    pub async fn end(self) {
        let Self { mut child, stdin, .. } = self;
        drop(stdin);
        if tokio::time::timeout(LAST_WORDS, child.wait()).await.is_err() {
            // Waits too; that it may be gone already is all right.
            child.kill().await.ok();
        }
    }

    /// Hands the program an input, which ends in a line end, and waits until it is through with it.
    ///
    /// # Errors
    ///
    /// If it does not answer within the limit or answers something unexpected; it must not be used afterwards.
    pub async fn transact(&mut self, input: &str, patience: &Patience) -> Result<Fate, DriverError> {
        self.used = clock::now();
        let lines_before = self.lines;
        let acknowledgement = format!("# ack-{}", self.acknowledged + 1);
        let Self { stdin, stdout, .. } = self;
        let write = async {
            // A program that ended early is noticed by its silence.
            let written = async {
                feed(stdin, input, &patience.progress).await?;
                stdin.write_all(format!("{acknowledgement}\n").as_bytes()).await?;
                stdin.flush().await
            };
            written.await.ok();
        };
        let read = async {
            let mut line = Vec::new();
            loop {
                line.clear();
                match stdout.read_until(b'\n', &mut line).await {
                    Ok(0) | Err(_) => return false,
                    Ok(_) if line.trim_ascii_end() == acknowledgement.as_bytes() => return true,
                    Ok(_) => patience.progress.chunk(),
                }
            }
        };
        let both = async { tokio::join!(write, read).1 };
        let Some(through) = patience.with(&self.program, both).await else {
            return Err(DriverError::Timeout { program: shown(&self.program), after: patience.limit });
        };
        let given = input.bytes().filter(|byte| *byte == b'\n').count() + 1;
        self.lines = self.lines.saturating_add(u32::try_from(given).unwrap_or(u32::MAX));
        if through {
            self.acknowledged += 1;
            // Warnings about inputs that went in are of no use to later ones.
            self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return Ok(Fate::Acknowledged);
        }
        let ended = async {
            let status = self.child.wait().await;
            (&mut self.stderr_task).await.ok();
            status
        };
        let Some(status) = patience.with(&self.program, ended).await else {
            return Err(DriverError::Timeout { program: shown(&self.program), after: patience.limit });
        };
        let status = status_code(status.map_err(|source| lost(&self.program, source))?);
        let stderr = std::mem::take(&mut *self.stderr.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Fate::Ended { status, stderr: String::from_utf8_lossy(&stderr).into_owned(), lines_before })
    }
}

/// Keeps what the program complains about, up to a limit.
async fn collect(mut pipe: ChildStderr, kept: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = [0; 4096];
    while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_STDERR.saturating_sub(kept.len()).min(length);
        kept.extend_from_slice(chunk.get(..room).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> (PathBuf, Vec<String>) {
        (PathBuf::from("/bin/sh"), vec!["-c".to_owned(), script.to_owned()])
    }

    fn patience(limit: Duration) -> Patience {
        Patience { limit, progress: Progress::default() }
    }

    #[test]
    fn what_a_program_says_is_progress() {
        let (sh, args) = shell("echo 1; sleep 0.2; echo 2; sleep 0.2; echo 3");
        let patience = patience(LIMIT);
        block_on(run_with(&sh, &args, "", &[], &patience, |_| {})).unwrap();
        assert!(patience.progress.movement(clock::now()).chunks >= 2);
    }

    #[test]
    fn a_program_that_is_told_to_end_is_waited_for_and_killed_if_it_does_not() {
        block_on(async {
            for script in ["cat", "trap '' TERM; cat; exec sleep 60"] {
                let (sh, args) = shell(script);
                let held = HeldOpen::start(&sh, &args).unwrap();
                let pid = held.pid().unwrap();
                assert!(held.resident().unwrap() > 0);
                held.end().await;
                assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{script}");
            }
        });
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn large_input_and_output_do_not_block_each_other() {
        let (sh, args) = shell("cat; echo done >&2; exit 3");
        let input = "x".repeat(1 << 20);
        let finished = block_on(run(&sh, &args, &input, LIMIT)).unwrap();
        assert_eq!((finished.status, finished.stdout.len(), finished.stderr.as_str()), (3, 1 << 20, "done\n"));
    }

    #[test]
    fn a_program_that_reads_nothing_reports_its_status() {
        let (sh, args) = shell("exit 4");
        assert_eq!(block_on(run(&sh, &args, &"x".repeat(1 << 20), LIMIT)).unwrap().status, 4);
    }

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let (sh, args) = shell("exec sleep 60");
        let limit = Duration::from_millis(50);
        assert!(matches!(block_on(run(&sh, &args, "", limit)), Err(DriverError::Timeout { .. })));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = block_on(run(Path::new("/nosuch/program"), &[], "", LIMIT)).unwrap_err();
        assert_eq!(error.to_string(), "`/nosuch/program` could not be started");
    }

    #[test]
    fn a_held_open_program_acknowledges_each_input_and_says_why_it_ended() {
        block_on(async {
            let (sh, args) = shell(
                "while read -r line; do case $line in '#'*) echo \"$line\";; bad) echo oops >&2; exit 2;; *) echo noise;; esac; done",
            );
            let mut held = HeldOpen::start(&sh, &args).unwrap();
            for _ in 0..3 {
                assert!(matches!(held.transact("one\ntwo\n", &patience(LIMIT)).await.unwrap(), Fate::Acknowledged));
            }
            assert!(held.is_usable());
            let Fate::Ended { status, stderr, lines_before } = held.transact("bad\n", &patience(LIMIT)).await.unwrap()
            else {
                panic!();
            };
            assert_eq!((status, stderr.as_str(), lines_before), (2, "oops\n", 9));
            assert!(!held.is_usable());
        });
    }

    #[test]
    fn a_held_open_program_that_stays_silent_times_out() {
        block_on(async {
            let (sh, args) = shell("cat >/dev/null; sleep 60");
            let mut held = HeldOpen::start(&sh, &args).unwrap();
            let silence = held.transact("x\n", &patience(Duration::from_millis(50))).await;
            assert!(matches!(silence, Err(DriverError::Timeout { .. })));
        });
    }
}
