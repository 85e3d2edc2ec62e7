//! Waiting for the datastore before anything else happens (datastore.md S-30, S-31).
//!
//! Feeds the agent's bootstrap with the configuration that is stored in etcd. Nothing is started, and nothing in the
//! kernel touched, before this has succeeded.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use model::Update;
use model::update::ConfigSource;
use tracing::{info, warn};

use crate::RESOURCES;
use crate::connect::{CallError, Connection};
use crate::decode::Decoder;

/// Raw parameters as stored, one map per source; a resource that does not exist or cannot be read is an empty map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawConfig {
    pub cluster_information: BTreeMap<String, String>,
    /// FelixConfiguration `default`.
    pub default: BTreeMap<String, String>,
    /// FelixConfiguration `node.<hostname>`.
    pub node: BTreeMap<String, String>,
}

/// Why the start is being waited with.
#[derive(Debug)]
pub enum Waiting {
    /// etcd does not answer, or refuses.
    Unreachable(CallError),
    /// ClusterInformation `default` does not exist or is damaged.
    NoClusterInformation,
    /// `datastoreReady` is not `true`.
    NotReady,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => write!(f, "etcd cannot be read: {error}"),
            Self::NoClusterInformation => f.write_str("ClusterInformation \"default\" does not exist or is invalid"),
            Self::NotReady => f.write_str("datastoreReady of ClusterInformation \"default\" is not true"),
        }
    }
}

/// Time between two attempts (S-30).
const RETRY: Duration = Duration::from_secs(1);

/// Time between two log lines while nothing changes.
const REMINDER: Duration = Duration::from_secs(60);

/// Waits without end until the datastore is ready and its configuration is read.
pub(crate) async fn wait_ready(
    connection: Connection,
    decoder: Decoder,
    hostname: &str,
    mut on_wait: impl FnMut(&Waiting),
) -> RawConfig {
    let begin = now();
    let mut reader = Reader { connection, decoder, known: BTreeMap::new() };
    let mut said: Option<(String, Instant)> = None;
    loop {
        let waiting = match reader.attempt(hostname).await {
            Ok(config) => {
                if said.is_some() {
                    info!(waited_seconds = begin.elapsed().as_secs(), "datastore is ready");
                }
                return config;
            }
            Err(waiting) => waiting,
        };
        let text = waiting.to_string();
        let news = said.as_ref().is_none_or(|(last, at)| *last != text || now().duration_since(*at) >= REMINDER);
        if news {
            warn!(waiting_for = text, waited_seconds = begin.elapsed().as_secs(), "waiting for the datastore");
            said = Some((text, now()));
        }
        on_wait(&waiting);
        tokio::time::sleep(RETRY).await;
    }
}

struct Reader {
    connection: Connection,
    decoder: Decoder,
    /// What was read last, with its revision, so that a damaged value is complained about once and not every second.
    known: BTreeMap<String, (i64, Vec<Update>)>,
}

impl Reader {
    async fn attempt(&mut self, hostname: &str) -> Result<RawConfig, Waiting> {
        let mut cluster_information = None;
        let mut ready = None;
        for update in self.read("clusterinformations/default").await? {
            if let Update::Ready(flag) = update {
                ready = flag;
            } else if let Update::Config(ConfigSource::ClusterInformation, values) = update {
                cluster_information = values;
            }
        }
        let cluster_information = cluster_information.ok_or(Waiting::NoClusterInformation)?;
        if ready != Some(true) {
            return Err(Waiting::NotReady);
        }
        Ok(RawConfig {
            cluster_information: (*cluster_information).clone(),
            default: self.felix_configuration("default").await?,
            node: self.felix_configuration(&format!("node.{hostname}")).await?,
        })
    }

    async fn felix_configuration(&mut self, name: &str) -> Result<BTreeMap<String, String>, Waiting> {
        let updates = self.read(&format!("felixconfigurations/{name}")).await?;
        let values = updates.into_iter().find_map(|update| {
            if let Update::Config(ConfigSource::FelixConfiguration(_), values) = update { values } else { None }
        });
        Ok(values.map(|values| (*values).clone()).unwrap_or_default())
    }

    /// Reads one resource and converts it.
    async fn read(&mut self, name: &str) -> Result<Vec<Update>, Waiting> {
        let key = format!("{RESOURCES}{name}");
        let limit = self.connection.limits().call;
        let response = self.connection.get(key.as_bytes(), None, limit).await.map_err(Waiting::Unreachable)?;
        let kv = response.kvs().first();
        let revision = kv.map_or(0, |kv| kv.mod_revision());
        if let Some((known, updates)) = self.known.get(name)
            && *known == revision
        {
            return Ok(updates.clone());
        }
        let mut updates = Vec::new();
        self.decoder.decode(key.as_bytes(), kv.map(|kv| kv.value()), &mut updates);
        self.known.insert(name.to_owned(), (revision, updates.clone()));
        Ok(updates)
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
