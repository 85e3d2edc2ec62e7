//! Processes that end: with their children, when they take too long or when somebody asks us to stop.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

/// Set once somebody asked us to stop.
pub(super) static STOP: AtomicBool = AtomicBool::new(false);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Status(ExitStatus),
    TookTooLong,
    Interrupted,
}

/// From now on SIGINT and SIGTERM set [`STOP`]. Before any other thread is started: they inherit the
/// mask. So do the processes that we start, which is why those are ended with SIGKILL.
pub(super) fn stop_on_signals() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Runs a command with its output in a file, in a process group of its own: a test that hangs is not
/// ended by ending the `cargo` that started it.
pub(super) fn run(command: &mut Command, log: &Path, limit: Duration, stop: &AtomicBool) -> anyhow::Result<End> {
    let file = File::create(log).with_context(|| log.display().to_string())?;
    let mut child = command.stdout(file.try_clone()?).stderr(file).process_group(0).spawn()?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(End::Status(status));
        }
        let end = if stop.load(Ordering::Relaxed) {
            End::Interrupted
        } else if start.elapsed() > limit {
            End::TookTooLong
        } else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        kill_group(&mut child)?;
        return Ok(end);
    }
}

fn kill_group(child: &mut Child) -> anyhow::Result<()> {
    let group = Pid::from_raw(i32::try_from(child.id())?);
    match killpg(group, Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => (),
        Err(error) => return Err(error).context("cannot end what was started"),
    }
    child.wait()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell whose child would outlive it; the child's id is its output.
    fn endless() -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo $!; wait"]);
        command
    }

    /// True once the process is gone or waits only for init to take note of it.
    fn is_gone(pid: &str) -> bool {
        (0..100).any(|_| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let is_gone = stat.is_empty() || stat.contains(") Z ");
            if !is_gone {
                std::thread::sleep(Duration::from_millis(20));
            }
            is_gone
        })
    }

    #[test]
    fn what_takes_too_long_or_is_interrupted_ends_with_its_children() {
        let log = std::env::temp_dir().join(format!("xtask-process-{}", std::process::id()));
        for expected in [End::TookTooLong, End::Interrupted] {
            let stop = AtomicBool::new(false);
            let end = std::thread::scope(|scope| {
                if expected == End::Interrupted {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(300));
                        stop.store(true, Ordering::Relaxed);
                    });
                }
                let limit = if expected == End::Interrupted { 600_000 } else { 300 };
                run(&mut endless(), &log, Duration::from_millis(limit), &stop).unwrap()
            });
            assert_eq!(end, expected);
            let pid = std::fs::read_to_string(&log).unwrap();
            assert!(!pid.trim().is_empty() && is_gone(pid.trim()), "{expected:?} left {pid}");
        }
        std::fs::remove_file(&log).unwrap();
    }

    #[test]
    fn a_process_that_ends_by_itself_tells_its_status() {
        let log = std::env::temp_dir().join(format!("xtask-status-{}", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "echo words; exit 3"]);
        let end = run(&mut command, &log, Duration::from_secs(600), &AtomicBool::new(false)).unwrap();
        assert!(matches!(end, End::Status(status) if status.code() == Some(3)));
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "words\n");
        std::fs::remove_file(&log).unwrap();
    }
}
