//! A network that makes trouble: a TCP proxy that is slow, or cuts connections half-way.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use testkit::netns::Netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

/// A running proxy; connections through it end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    endpoint: String,
    state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    delay: Duration,
    /// How many bytes of the server pass until the connection is cut, and how often that happens.
    cut: Option<(u64, u32)>,
    cuts: u32,
    most_sent: u64,
}

impl Proxy {
    /// Starts to listen in `netns`, and to connect to `target` from there.
    ///
    /// # Errors
    ///
    /// If the address is taken.
    pub fn start(netns: &Netns, listen: SocketAddr, target: SocketAddr) -> Result<Self> {
        let listener = netns.enter(|| std::net::TcpListener::bind(listen)).context("the proxy's address")?;
        listener.set_nonblocking(true)?;
        let path = netns.path();
        let state = Arc::new(Mutex::new(State::default()));
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(move || {
            let entered = std::fs::File::open(path)
                .map_err(anyhow::Error::from)
                .and_then(|file| Ok(nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            // Without a runtime nobody is served, which fails the test that wants to be.
            if let (Ok(()), Ok(runtime)) = (entered, runtime) {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = accept(listener, target, shared) => {}
                    }
                });
            }
        })?;
        Ok(Self { endpoint: format!("http://{listen}"), state, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the URL at which agents reach etcd through this.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Lets every answer of the server take this much longer.
    pub fn delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Cuts a connection when the server has sent this much on it, and so often.
    pub fn cut_after(&self, bytes: u64, times: u32) {
        self.state().cut = Some((bytes, times));
    }

    /// Returns how many connections have been cut.
    #[must_use]
    pub fn cuts(&self) -> u32 {
        self.state().cuts
    }

    /// Returns how many bytes the server has sent on the connection on which it has sent the most.
    #[must_use]
    pub fn most_sent(&self) -> u64 {
        self.state().most_sent
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed; there is nothing to add while cleaning up.
            drop(thread.join());
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: std::net::TcpListener, target: SocketAddr, state: Arc<Mutex<State>>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            if let Ok(server) = TcpStream::connect(target).await {
                carry(client, server, &state).await;
            }
        });
    }
}

/// Carries bytes both ways until one side ends or the connection is to be cut.
async fn carry(client: TcpStream, server: TcpStream, state: &Mutex<State>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (late, mut due) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let there = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let back = async {
        let mut seen = 0;
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let length = from_server.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            let cut = take(state, &mut seen, length);
            let at = Instant::now() + lock(state).delay;
            if late.send((at, buffer[..cut.unwrap_or(length)].to_vec())).is_err() || cut.is_some() {
                // What is on its way arrives before the end does.
                tokio::time::sleep_until((at + Duration::from_millis(20)).into()).await;
                return Ok::<(), std::io::Error>(());
            }
        }
    };
    let later = async {
        while let Some((at, bytes)) = due.recv().await {
            tokio::time::sleep_until(at.into()).await;
            to_client.write_all(&bytes).await?;
        }
        Ok::<(), std::io::Error>(())
    };
    // However it ends, both sides see it: the halves are dropped here.
    tokio::select! {
        _ = there => {}
        _ = back => {}
        _ = later => {}
    }
}

/// Takes note of bytes of the server, and returns how many of them still pass if the connection is to be cut.
fn take(state: &Mutex<State>, seen: &mut u64, length: usize) -> Option<usize> {
    let mut state = lock(state);
    *seen += length as u64;
    state.most_sent = state.most_sent.max(*seen);
    let (limit, times) = state.cut.filter(|(limit, times)| *times > 0 && *seen > *limit)?;
    state.cut = Some((limit, times - 1));
    state.cuts += 1;
    Some(length - usize::try_from(*seen - limit).unwrap_or(length).min(length))
}
