//! etcd in, typed updates out.
//!
//! What the agent does with it:
//!
//! ```no_run
//! use datastore::{Backlog, ConnectOptions, Datastore, FromDatastore};
//!
//! # async fn example() -> Result<(), datastore::ConfigError> {
//! // Fails only for settings that cannot work: a missing certificate file, a malformed endpoint.
//! let datastore = Datastore::new(ConnectOptions::new(["http://127.0.0.1:2379"])).await?;
//! // Waits, for ever if need be, until `datastoreReady` is true. Drop the future to give up.
//! let config = datastore.wait_ready("compute-1").await;
//! # drop(config);
//! let (sender, mut receiver) = tokio::sync::mpsc::channel(16);
//! let options = model::convert::Options::default();
//! // Runs until the receiver is dropped, whatever happens to etcd.
//! let follow = datastore.run(options, sender);
//! let consume = async {
//!     let mut backlog = Backlog::default();
//!     while let Some(message) = receiver.recv().await {
//!         match message {
//!             FromDatastore::Updates(updates) => backlog.extend(updates),
//!             // Everything that led to this state was sent before.
//!             FromDatastore::State(state) => println!("{}", state.as_str()),
//!         }
//!     }
//! };
//! tokio::join!(follow, consume);
//! # Ok(())
//! # }
//! ```
//!
//! The way of a change: [`connect`] (one client, one endpoint at a time) → [`watch`] (the shell, which does I/O and
//! decides nothing) → [`resync`] (the machine, which decides everything and does no I/O) → [`decode`] (resources to
//! records; damaged values become absent) → channel → [`Backlog`].
//!
//! Invariants: nothing is deleted on the strength of an incomplete list (I3); the channel is bounded and the backlog
//! is keyed by object, so memory follows the number of objects (I7); no credential is logged (I12).

pub mod backlog;
pub mod connect;
pub mod resync;

mod decode;
mod ready;
mod watch;

use model::Update;
use model::convert::Options;
use tokio::sync::mpsc::Sender;

pub use backlog::Backlog;
pub use connect::{CallError, ConfigError, ConnectOptions, Credentials, Limits, TlsFiles};
pub use ready::{RawConfig, Waiting};
pub use resync::{Pace, SyncState};

use connect::Connection;
use decode::Decoder;

/// Prefix of all resources that are read (datastore.md 1.1, H-9).
pub const RESOURCES: &str = "/calico/resources/v3/projectcalico.org/";

/// What [`Datastore::run`] sends.
#[derive(Clone, Debug, PartialEq)]
pub enum FromDatastore {
    /// In order; later updates of one object replace earlier ones.
    Updates(Vec<Update>),
    /// The state has changed, and every update that led to it was sent before. [`SyncState::WaitForReady`] is sent
    /// once at the beginning (S-1).
    State(SyncState),
}

/// An etcd cluster with checked settings. Connections are made by the methods, one for each call.
#[derive(Clone, Debug)]
pub struct Datastore {
    options: ConnectOptions,
    pace: Pace,
}

impl Datastore {
    /// Checks the settings; does not connect.
    ///
    /// # Errors
    ///
    /// If the settings can never work, such as a certificate file that is missing (E-8).
    pub async fn new(options: ConnectOptions) -> Result<Self, ConfigError> {
        connect::check(&options).await?;
        Ok(Self { options, pace: Pace::default() })
    }

    /// Replaces the page size and the delays between attempts, for tests.
    #[must_use]
    pub fn with_pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// Waits until ClusterInformation `default` says that the datastore is ready, and returns the configuration
    /// stored for this host. Retries every second without end; drop the future to stop (S-30, S-31).
    pub async fn wait_ready(&self, hostname: &str) -> RawConfig {
        self.wait_ready_with(hostname, |_| {}).await
    }

    /// Like [`Self::wait_ready`]; calls `on_wait` after each attempt that failed, for health reports.
    pub async fn wait_ready_with(&self, hostname: &str, on_wait: impl FnMut(&Waiting)) -> RawConfig {
        let decoder = Decoder::new(Options::default());
        ready::wait_ready(Connection::new(self.options.clone()), decoder, hostname, on_wait).await
    }

    /// Sends everything under [`RESOURCES`], with the records that exist without being stored, and then every change, until the receiver is dropped. Failures of etcd
    /// are logged and retried without end; nothing is sent for them except, after ten minutes,
    /// [`SyncState::WaitForReady`] (S-12).
    pub async fn run(&self, options: Options, out: Sender<FromDatastore>) {
        let connection = Connection::new(self.options.clone());
        watch::run(RESOURCES, connection, self.pace, Decoder::new(options), &out).await;
    }
}
