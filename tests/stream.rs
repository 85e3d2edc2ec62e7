//! A stream of echo requests, one per millisecond, and what became of each.
//!
//! Every request has an id of its own, so that each is judged by the rules and none by an entry of connection tracking.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use testkit::frames::{self, Token};
use testkit::netns::Netns;
use testkit::packets::{self, Echo, ReceivedKind};

/// How long the last answers may take.
const LINGER: Duration = Duration::from_secs(1);

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// When it was sent.
    pub at: Instant,
    /// When it was answered, if it was.
    pub answered: Option<Instant>,
}

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    token: Token,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
    log: Arc<Mutex<Vec<Sent>>>,
    sender: JoinHandle<Result<()>>,
    receiver: JoinHandle<Result<()>>,
}

impl Stream {
    /// Starts to send from `netns` to `destination`.
    ///
    /// # Errors
    ///
    /// If the socket cannot be opened.
    pub fn start(netns: &Netns, destination: IpAddr) -> Result<Self> {
        let token = packets::token();
        let echo = netns.enter(|| Echo::open(destination))?;
        let receiving = echo.try_clone()?;
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let log = Arc::new(Mutex::new(Vec::new()));
        let sender = {
            let (stop, log) = (Arc::clone(&stop), Arc::clone(&log));
            std::thread::Builder::new().name("stream".to_owned()).spawn(move || send(&echo, token, &stop, &log))?
        };
        let receiver = {
            let (done, log) = (Arc::clone(&done), Arc::clone(&log));
            std::thread::Builder::new()
                .name("answers".to_owned())
                .spawn(move || receive(&receiving, token, &done, &log))?
        };
        Ok(Self { token, stop, done, log, sender, receiver })
    }

    /// Returns what every request of the stream carries.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// Returns what has been sent and answered so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Sent> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops sending, waits for the last answers and returns everything.
    ///
    /// # Errors
    ///
    /// If a request could not be sent or the socket failed.
    pub fn finish(self) -> Result<Vec<Sent>> {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        let deadline = Instant::now() + LINGER;
        let complete = || {
            let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            log.iter().all(|sent| sent.answered.is_some())
        };
        while !complete() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.done.store(true, Ordering::Relaxed);
        self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        Ok(std::mem::take(&mut self.log.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Returns how many requests have no answer.
#[must_use]
pub fn lost(log: &[Sent]) -> usize {
    log.iter().filter(|sent| sent.answered.is_none()).count()
}

fn send(echo: &Echo, token: Token, stop: &AtomicBool, log: &Mutex<Vec<Sent>>) -> Result<()> {
    let start = Instant::now();
    for number in 0_u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let payload = [&token[..], &number.to_be_bytes()].concat();
        log.lock().unwrap_or_else(PoisonError::into_inner).push(Sent { at: Instant::now(), answered: None });
        // Never an id of `packets::echo`, whose packets may have been let through before the rules were there.
        let [_, _, high, low] = (number & 0x7fff).to_be_bytes();
        // A full queue or a filter on the way out is a lost packet, not a failed test.
        if let Err(error) = echo.send(u16::from_be_bytes([high, low]), 1, &payload)
            && error.raw_os_error() != Some(nix::errno::Errno::EPERM as i32)
        {
            return Err(error).context("send");
        }
        let next = start + Duration::from_millis(1) * (number + 1);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn receive(echo: &Echo, token: Token, done: &AtomicBool, log: &Mutex<Vec<Sent>>) -> Result<()> {
    while !done.load(Ordering::Relaxed) {
        let Some(received) = echo.receive(Duration::from_millis(50))? else { continue };
        let now = Instant::now();
        if received.kind != ReceivedKind::Reply || !frames::contains(&received.payload, &token) {
            continue;
        }
        let number = received.payload.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sent) = number.and_then(|number| log.get_mut(number as usize)) {
            sent.answered.get_or_insert(now);
        }
    }
    Ok(())
}
