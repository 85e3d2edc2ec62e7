//! Brings the kernel to what a program says.

pub mod apply;
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
pub mod options;
pub mod report;
pub mod retry;
pub mod routes;
pub mod sysctl;

pub use apply::ApplyLoop;
pub use error::DriverError;
pub use kernel::Kernel;
pub use options::{ChainInsertMode, Options, Variant};
pub use report::{DriverReport, Report};
