//! A real etcd in a namespace, and a client beside it.
//!
//! An agent reaches it over the management network of the bed. The client lives on a thread that stays in the
//! namespace, so that whoever writes needs to be in none.

use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use etcd_client::{Client, DeleteOptions, GetOptions, Txn, TxnOp};
use tempfile::TempDir;
use testkit::netns::{Netns, Process, scratch};
use tokio::sync::{mpsc, oneshot};

use crate::data::{Content, Event};

/// How long etcd may take to start.
const START: Duration = Duration::from_secs(20);

/// The most changes that etcd takes in one transaction by default (`--max-txn-ops`) are 128.
pub const AT_ONCE: usize = 100;

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Store {
    endpoint: String,
    calls: mpsc::UnboundedSender<Call>,
    // Dropped in this order: the server before its directory.
    server: Process,
    _directory: TempDir,
}

#[derive(Debug)]
struct Call {
    request: Request,
    answer: oneshot::Sender<Result<Content>>,
}

#[derive(Debug)]
enum Request {
    Put(String, String),
    PutAll(Vec<(String, String)>),
    Delete(String),
    List(String),
    Clear,
}

impl Store {
    /// Starts etcd on the loopback of `netns` and on `address`, and connects to it.
    ///
    /// # Errors
    ///
    /// If etcd is not installed or does not answer.
    pub fn start(netns: &Netns, address: Ipv4Addr) -> Result<Self> {
        // In memory if possible: durability is not under test, the disk's fsync would be.
        let directory = scratch()?;
        let endpoint = format!("http://{address}:2379");
        let clients = format!("http://127.0.0.1:2379,{endpoint}");
        let peers = "http://127.0.0.1:2380";
        let server = netns.spawn(&[
            "etcd",
            "--name=bed",
            &format!("--data-dir={}", directory.path().join("data").display()),
            &format!("--listen-client-urls={clients}"),
            &format!("--advertise-client-urls={endpoint}"),
            &format!("--listen-peer-urls={peers}"),
            &format!("--initial-advertise-peer-urls={peers}"),
            &format!("--initial-cluster=bed={peers}"),
        ])?;
        let (calls, inbox) = mpsc::unbounded_channel();
        let mut store = Self { endpoint, calls, server, _directory: directory };
        store.await_port(netns)?;
        let path = netns.path();
        std::thread::Builder::new().name("etcd client".to_owned()).spawn(move || serve(&path, inbox))?;
        store.list("/").context("first request to etcd")?;
        Ok(store)
    }

    /// Waits until the server accepts connections.
    fn await_port(&mut self, netns: &Netns) -> Result<()> {
        let deadline = Instant::now() + START;
        while netns.enter(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 2379)).is_err()) {
            ensure!(self.server.is_running()?, "etcd ended at once (is etcd-server installed?)");
            ensure!(Instant::now() < deadline, "etcd does not listen after {START:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Returns the URL at which agents reach the server.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes one change; when this returns, etcd has it.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn apply(&self, event: &Event) -> Result<()> {
        match event {
            Event::Put(key, value) => self.put(key, value),
            Event::Delete(key) => self.delete(key),
        }
    }

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.call(Request::Put(key.to_owned(), value.to_owned())).map(drop)
    }

    /// Writes many values, [`AT_ONCE`] in one transaction.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn put_all(&self, pairs: impl IntoIterator<Item = (String, String)>) -> Result<()> {
        self.call(Request::PutAll(pairs.into_iter().collect())).map(drop)
    }

    /// Deletes a key.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.call(Request::Delete(key.to_owned())).map(drop)
    }

    /// Returns everything under a prefix.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn list(&self, prefix: &str) -> Result<Content> {
        self.call(Request::List(prefix.to_owned()))
    }

    /// Writes all of `content`, the flag that the datastore is ready last.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn load(&self, content: &Content) -> Result<()> {
        let all = content.iter().map(|(key, value)| (key.clone(), value.clone()));
        let (ready, rest): (Vec<_>, Vec<_>) = all.partition(|(key, _)| key.contains("/clusterinformations/"));
        self.put_all(rest)?;
        self.put_all(ready)
    }

    /// Deletes everything.
    ///
    /// # Errors
    ///
    /// The client's.
    pub fn clear(&self) -> Result<()> {
        self.call(Request::Clear).map(drop)
    }

    fn call(&self, request: Request) -> Result<Content> {
        let (answer, result) = oneshot::channel();
        self.calls.send(Call { request, answer }).map_err(|_| anyhow!("the etcd client has ended"))?;
        result.blocking_recv().context("the etcd client has ended")?
    }
}

/// Performs requests until nobody can make one any more.
fn serve(netns: &std::path::Path, mut inbox: mpsc::UnboundedReceiver<Call>) {
    let connected = connect(netns);
    let (runtime, mut client) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            if let Some(call) = inbox.blocking_recv() {
                // Whoever waits gets the reason; whoever comes later gets "has ended".
                drop(call.answer.send(Err(error)));
            }
            return;
        }
    };
    runtime.block_on(async {
        while let Some(call) = inbox.recv().await {
            // The caller waits, unless it panicked.
            drop(call.answer.send(perform(&mut client, call.request).await));
        }
    });
}

fn connect(netns: &std::path::Path) -> Result<(tokio::runtime::Runtime, Client)> {
    nix::sched::setns(std::fs::File::open(netns)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = runtime.block_on(Client::connect(["http://127.0.0.1:2379"], None))?;
    Ok((runtime, client))
}

async fn perform(client: &mut Client, request: Request) -> Result<Content> {
    let mut found = Content::new();
    match request {
        Request::Put(key, value) => {
            client.put(key, value, None).await?;
        }
        Request::PutAll(pairs) => {
            for pairs in pairs.chunks(AT_ONCE) {
                let puts = pairs.iter().map(|(key, value)| TxnOp::put(key.as_str(), value.as_str(), None));
                client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await?;
            }
        }
        Request::Delete(key) => {
            client.delete(key, None).await?;
        }
        Request::Clear => {
            client.delete("/", Some(DeleteOptions::new().with_prefix())).await?;
        }
        Request::List(prefix) => {
            let listed = client.get(prefix, Some(GetOptions::new().with_prefix())).await?;
            for pair in listed.kvs() {
                found.insert(pair.key_str()?.to_owned(), pair.value_str()?.to_owned());
            }
        }
    }
    Ok(found)
}
