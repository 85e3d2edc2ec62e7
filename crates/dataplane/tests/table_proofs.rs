//! When a proof that nobody has changed a table makes do for reading it, without a kernel.
//!
//! One family: the driver does not know of which it is, nor does what stands in for the kernel here.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::driver::Driver as _;
use dataplane::iptables::backend::{FamilyTools, TableTransport};
use dataplane::iptables::{Checks, FamilyTables, Features, TableRequest, TableResponse};
use dataplane::{ChainInsertMode, Variant};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use program::{Family, Table, TableChanges};

use support::*;

/// What the transport saw, and what it is to say.
#[derive(Default)]
struct Script {
    listings: u32,
    questions: u32,
    writes: u32,
    unchanged: bool,
    /// Listings fail.
    broken: bool,
}

/// The filter table in memory; the others are empty.
struct Scripted {
    script: Arc<Mutex<Script>>,
    filter: FakeKernel,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl TableTransport for Scripted {
    fn perform<'a>(&'a mut self, request: &'a TableRequest) -> BoxFuture<'a, TableResponse> {
        let mut script = self.script.lock().unwrap();
        let response = match request {
            TableRequest::Save { table: Table::Filter, .. } => {
                script.listings += 1;
                if script.broken { refused("no") } else { TableResponse::Done(self.filter.list()) }
            }
            TableRequest::Save { .. } => TableResponse::NotLoaded,
            TableRequest::Restore(input) => {
                script.writes += 1;
                self.filter.restore(input)
            }
            TableRequest::Chains { .. } | TableRequest::Remove { .. } => panic!("{request:?}"),
        };
        ready(response).boxed()
    }

    fn is_unchanged(&mut self, table: Table) -> BoxFuture<'_, bool> {
        assert_eq!(table, Table::Filter);
        let mut script = self.script.lock().unwrap();
        script.questions += 1;
        ready(script.unchanged).boxed()
    }
}

struct World {
    runtime: tokio::runtime::Runtime,
    family: FamilyTables,
    script: Arc<Mutex<Script>>,
}

impl World {
    fn new(variant: Variant) -> Self {
        let script = Arc::<Mutex<Script>>::default();
        let transport = Scripted { script: Arc::clone(&script), filter: FakeKernel::new(variant) };
        let tools = FamilyTools { family: Family::V4, features: Features::default(), transport: Box::new(transport) };
        let checks = Checks { refresh: Some(Duration::from_secs(10)), after_write: Duration::from_secs(1) };
        let family = FamilyTables::new(tools, variant, ChainInsertMode::Insert, checks);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, family, script }
    }

    fn write(&mut self, chain: &str) {
        let mut changes = TableChanges::default();
        put(&mut changes, chain, vec![drop_all()]);
        self.family.want(Table::Filter, changes);
        let Self { runtime, family, .. } = self;
        let reports = runtime.block_on(async {
            // Reads without a cause are left to the background.
            family.begin(&std::collections::BTreeMap::new(), false, true);
            family.run().await
        });
        assert!(reports.iter().all(|report| report.errors.is_empty()), "{reports:?}");
    }

    /// Looks at the filter table as if it were due; returns the listings and the questions that this took.
    fn look(&mut self) -> (u32, u32) {
        let before = self.counts();
        let Self { runtime, family, .. } = self;
        let began = Instant::now();
        runtime.block_on(family.sweep(Table::Filter));
        // With or without a listing, this counts as the look that was due.
        assert!(family.sweep_due().is_none_or(|(due, table)| table != Table::Filter || due > began));
        let after = self.counts();
        (after.0 - before.0, after.1 - before.1)
    }

    fn counts(&self) -> (u32, u32) {
        let script = self.script.lock().unwrap();
        (script.listings, script.questions)
    }

    fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }
}

const LISTED: (u32, u32) = (1, 0);
const LISTED_WITHOUT_PROOF: (u32, u32) = (1, 1);
const PROVEN: (u32, u32) = (0, 1);

#[test]
fn a_proof_makes_do_for_twenty_listings_but_not_for_what_was_written_since() {
    for variant in [Variant::Legacy, Variant::Nft] {
        let mut world = World::new(variant);
        world.script(|script| script.unchanged = true);
        world.write("cali-a");
        assert_eq!(world.look(), LISTED, "nobody has looked since the write");
        for _ in 0..20 {
            assert_eq!(world.look(), PROVEN);
        }
        assert_eq!(world.look(), LISTED);
        assert_eq!(world.look(), PROVEN);
        world.write("cali-b");
        assert_eq!(world.look(), LISTED);
        assert_eq!(world.look(), PROVEN);
        assert_eq!(world.script.lock().unwrap().writes, 2);
    }
}

#[test]
fn without_a_proof_the_table_is_listed() {
    let mut world = World::new(Variant::Nft);
    world.write("cali-a");
    assert_eq!(world.look(), LISTED);
    for _ in 0..3 {
        assert_eq!(world.look(), LISTED_WITHOUT_PROOF);
    }
}

#[test]
fn a_listing_that_was_of_no_use_is_not_confirmed() {
    let mut world = World::new(Variant::Legacy);
    world.write("cali-a");
    assert_eq!(world.look(), LISTED);
    world.script(|script| script.broken = true);
    assert_eq!(world.look(), LISTED_WITHOUT_PROOF);
    world.script(|script| script.unchanged = true);
    assert_eq!(world.look(), LISTED);
    world.script(|script| script.broken = false);
    assert_eq!(world.look(), LISTED);
    assert_eq!(world.look(), PROVEN);
}

#[test]
fn what_is_distrusted_is_listed_at_once() {
    let mut driver = driver(Variant::Nft, ChainInsertMode::Insert);
    let mut kernel = FakeKernel::new(Variant::Nft);
    let now = Instant::now();
    kernel.run(&mut driver, now).unwrap();
    assert!(driver.trusts_proofs());
    driver.distrust();
    assert!(!driver.trusts_proofs());
}
