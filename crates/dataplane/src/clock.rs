//! The one clock of the dataplane.
//!
//! Everything that waits or measures asks here, so that a paused tokio clock makes all of it deterministic.
//! The exception is [`crate::ipset::restore`], which blocks its thread and therefore polls by the real clock.

use std::time::Instant;

/// Returns the present moment as the runtime sees it; outside of a runtime the real one.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
