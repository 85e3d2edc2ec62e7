//! Brings the kernel to what a program says.

pub mod apply;
mod budget;
pub mod canary;
pub mod clock;
pub mod conntrack;
pub mod driver;
pub mod error;
pub mod exec;
pub mod ipset;
pub mod iptables;
pub mod kernel;
pub mod links;
mod neigh;
mod netlink;
mod nftables;
pub mod options;
pub mod progress;
pub mod report;
pub mod retry;
pub mod routes;
pub mod sysctl;

pub use apply::ApplyLoop;
pub use error::DriverError;
pub use kernel::Kernel;
pub use nftables::{Process, ReadRule, Touched};
pub use options::{ChainInsertMode, Options, Variant};
pub use progress::{Movement, Progress};
pub use report::{DriverReport, Report};
