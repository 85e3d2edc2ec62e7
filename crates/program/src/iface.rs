//! Kernel settings of workload interfaces.

/// How a workload interface is to be set up (host.md 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceSpec {
    /// The workload may use foreign source addresses: no reverse path filter on its interface.
    pub may_spoof: bool,
}
