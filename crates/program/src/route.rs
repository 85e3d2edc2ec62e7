//! Routes of local workloads.

use ipnet::IpNet;

/// A route to a local workload: the destination is reached directly through the workload's interface
/// (host.md 8). Written only while the interface exists and is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSpec {
    pub destination: IpNet,
    pub metric: u32,
    /// Where the destination is found on the link; becomes a static neighbour entry for IPv4 (host.md 11).
    pub mac: Option<[u8; 6]>,
}
