//! Brings the kernel to what a program says.

pub mod driver;
pub mod error;
pub mod exec;
pub mod ipset;
pub mod iptables;
pub mod links;
mod neigh;
mod netlink;
pub mod options;
pub mod report;
pub mod retry;
pub mod routes;
pub mod sysctl;

use program::Changes;

pub use error::DriverError;
pub use options::{ChainInsertMode, Options, Variant};
pub use report::{DriverReport, Report};

/// Owns all drivers. Lives on the apply thread, inside a current-thread tokio runtime.
#[derive(Debug)]
pub struct ApplyLoop {}

impl ApplyLoop {
    /// Allocates; touches nothing outside the process.
    pub fn new(_options: Options) -> Self {
        unimplemented!()
    }

    /// Applies one batch (an empty one retries and refreshes what is due). The first batch is
    /// complete: everything of ours that it does not name is swept, after proven-complete reads (I3).
    pub async fn apply(&mut self, _changes: Changes) -> Report {
        unimplemented!()
    }
}
