//! The agent without its threads and its datastore: graph, compiler and apply loop in the calling thread, one batch at
//! a time, in the namespace that the thread is in.
//!
//! Invariant: when a batch is done, all of it is in force, or there is an error.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use compiler::Compiler;
use dataplane::ApplyLoop;
use graph::Graph;
use model::Update;
use model::update::UpdateKey;
use program::Changes;
use testkit::build;
use tokio::runtime::Runtime;

/// How often the apply loop may come back to a batch.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// See the [module documentation](self).
#[derive(Debug)]
pub struct InProcess {
    graph: Graph,
    compiler: Compiler,
    apply: ApplyLoop,
    runtime: Runtime,
    /// What was said about each object last.
    facts: BTreeMap<UpdateKey, Update>,
}

impl InProcess {
    /// Makes an agent that knows nothing and has done nothing.
    ///
    /// # Errors
    ///
    /// If there is no room for its reactor.
    pub fn new(host: &str, compiler: compiler::Options, dataplane: dataplane::Options) -> Result<Self> {
        Ok(Self {
            graph: Graph::new(host.into()),
            compiler: Compiler::new(compiler),
            apply: ApplyLoop::new(dataplane),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().context("runtime")?,
            facts: BTreeMap::new(),
        })
    }

    /// Returns the facts that hold.
    #[must_use]
    pub fn facts(&self) -> &BTreeMap<UpdateKey, Update> {
        &self.facts
    }

    /// Takes in a batch of updates and brings the kernel to it; returns what had to change.
    ///
    /// # Errors
    ///
    /// If the kernel does not get there, or something is kept or closed instead of being as wanted.
    pub fn batch(&mut self, updates: Vec<Update>) -> Result<Changes> {
        for update in updates {
            if build::is_absent(&update) {
                self.facts.remove(&update.key());
            } else {
                self.facts.insert(update.key(), update.clone());
            }
            self.graph.apply(update);
        }
        let (changes, _complaints) = self.compiler.compile(&self.graph.take_batch());
        let mut next = changes.clone();
        for _ in 0..ATTEMPTS {
            let report = self.runtime.block_on(self.apply.apply(next));
            for driver in &report.drivers {
                ensure!(driver.held.is_empty(), "{} holds back: {:?}", driver.driver, driver.held);
                ensure!(driver.errors.is_empty(), "{} fails: {:?}", driver.driver, driver.errors);
            }
            if !report.failed() {
                return Ok(changes);
            }
            std::thread::sleep(PAUSE);
            next = Changes { seq: report.seq, ..Changes::default() };
        }
        bail!("something still waits after {ATTEMPTS} attempts")
    }
}
