//! The floor of the datastore: a write, and the same write seen by a watcher.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use etcd_client::{Client, WatchOptions};
use testkit::etcd::Etcd;

use crate::results::Results;

/// Measures single writes of a value of a workload endpoint's size, one after the other.
pub(crate) fn measure(rounds: usize, results: &mut Results) -> anyhow::Result<()> {
    let server = Etcd::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = Client::connect([server.endpoint()], None).await?;
        let mut stream = client.watch("/bench/", Some(WatchOptions::new().with_prefix())).await?;
        ensure!(stream.message().await?.context("the watch ended")?.created(), "the watch was not established");
        let value = "x".repeat(800);
        for round in 0..rounds {
            let start = Instant::now();
            client.put(format!("/bench/{round}"), value.as_str(), None).await?;
            results.time("floor/etcd/put", start.elapsed());
            loop {
                let message = stream.message().await?.context("the watch ended")?;
                if !message.events().is_empty() {
                    break;
                }
            }
            results.time("floor/etcd/put-to-event", start.elapsed());
        }
        Ok(())
    })
}
