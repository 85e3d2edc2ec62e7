//! The threads beside the main one: how they start, what they say, how they stop.
//!
//! A thread that ends, for whatever reason, tells the main thread; a panic is caught, so that the
//! process ends in order and the kernel is left as it is.

use std::any::Any;
use std::backtrace::Backtrace;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::mpsc;
use tracing::{error, warn};

use crate::apply_thread::Applied;

/// What the threads tell the main one.
#[derive(Debug)]
pub(crate) enum Message {
    /// The graph thread has taken in all it was given.
    WantsUpdates,
    /// A batch is done.
    Applied(Box<Applied>),
    /// A thread has ended.
    Ended(&'static str, How),
}

/// How a thread ended.
#[derive(Debug)]
pub(crate) enum How {
    Finished,
    Failed(anyhow::Error),
    Panicked,
}

/// Starts a thread; when it ends, `messages` hears how.
pub(crate) fn spawn(
    part: &'static str,
    messages: mpsc::Sender<Message>,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(part.to_owned())
        .spawn(move || {
            let how = match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(())) => How::Finished,
                Ok(Err(error)) => How::Failed(error),
                Err(_) => How::Panicked,
            };
            // Nobody listens any more if the main thread has gone ahead.
            messages.blocking_send(Message::Ended(part, how)).ok();
        })
        .with_context(|| format!("starting the {part} thread"))
}

/// Waits until the threads have ended, at most this long.
pub(crate) async fn wait(threads: &[JoinHandle<()>], at_most: Duration) {
    const STEP: Duration = Duration::from_millis(2);
    let deadline = Instant::now() + at_most;
    while threads.iter().any(|thread| !thread.is_finished()) {
        if Instant::now() >= deadline {
            for thread in threads.iter().filter(|thread| !thread.is_finished()) {
                warn!(part = thread.thread().name(), waited = ?at_most, "a thread is left behind");
            }
            return;
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Makes every panic a record of the log, with its place.
pub(crate) fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let place = panic.location().map(ToString::to_string);
        let reason = text(panic.payload());
        let trace = Backtrace::capture();
        error!(thread = thread.name(), place, reason, %trace, "panic");
    }));
}

fn text(payload: &dyn Any) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_thread_hears_how_a_thread_ended() {
        let how = |body: fn() -> anyhow::Result<()>| {
            let (sender, mut receiver) = mpsc::channel(1);
            spawn("graph", sender, body).unwrap();
            match receiver.blocking_recv() {
                Some(Message::Ended("graph", how)) => how,
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(how(|| Ok(())), How::Finished));
        assert!(matches!(how(|| anyhow::bail!("no")), How::Failed(_)));
        assert!(matches!(how(|| panic!("on purpose")), How::Panicked));
    }

    #[tokio::test]
    async fn waiting_for_a_thread_that_hangs_has_an_end() {
        let (release, wait_for) = std::sync::mpsc::channel::<()>();
        let threads = [std::thread::spawn(move || {
            wait_for.recv().ok();
        })];
        wait(&threads, Duration::from_millis(20)).await;
        assert!(!threads[0].is_finished());
        drop(release);
        wait(&threads, Duration::from_secs(10)).await;
        assert!(threads[0].is_finished());
    }
}
