//! When a table of the kernel was written, to a fraction of a millisecond and without reading it: a listing of a large
//! table takes longer than what is to be measured.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dataplane::iptables::native::Native;
use model::Family;
use tableinfo::{Asker, TableInfo};
use testkit::netns::Netns;

use crate::agent::Variant;

/// Between two looks.
const PAUSE: Duration = Duration::from_micros(300);

/// What changes whenever somebody writes: the number of the last transaction of nf_tables, the sizes of the legacy filter
/// tables of both families (if what is written has another size).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stamp {
    Generation(u32),
    Sizes([TableInfo; 2]),
}

/// Where stamps come from; belongs to the namespace of the thread that made it.
#[derive(Debug)]
enum Source {
    Native(Native),
    Askers([Asker; 2]),
}

impl Source {
    fn new(variant: Variant) -> Result<Self> {
        Ok(match variant {
            Variant::Nft => Self::Native(Native::new(Family::V4, Duration::from_secs(10))),
            Variant::Legacy => Self::Askers([Asker::new(false)?, Asker::new(true)?]),
        })
    }

    fn stamp(&mut self) -> Result<Stamp> {
        Ok(match self {
            Self::Native(native) => Stamp::Generation(native.generation()?),
            Self::Askers([v4, v6]) => Stamp::Sizes([v4.ask("filter")?, v6.ask("filter")?]),
        })
    }
}

/// Makes a change that gives the filter tables another size, and returns how long it took from the beginning of that until
/// the transaction after which `in_force` says that it is there. `in_force` may take its time.
///
/// # Errors
///
/// If the change cannot be made, the kernel cannot be asked, or it takes longer than `limit`.
pub fn time_to_force(
    host: &Netns,
    variant: Variant,
    limit: Duration,
    change: impl FnOnce() -> Result<()> + Send,
    in_force: impl Fn() -> Result<bool> + Send,
) -> Result<Duration> {
    host.enter(move || {
        let mut source = Source::new(variant)?;
        let mut seen = source.stamp()?;
        let began = Instant::now();
        change()?;
        loop {
            let stamp = source.stamp()?;
            let at = began.elapsed();
            if stamp != seen {
                let there = in_force()?;
                // A later transaction may have brought it.
                let later = source.stamp()? != stamp;
                if there {
                    return Ok(if later { began.elapsed() } else { at });
                }
                seen = stamp;
                continue;
            }
            ensure!(at < limit, "not in force within {limit:?}");
            std::thread::sleep(PAUSE);
        }
    })
}
