//! The boundary: everything that the drivers do to the kernel goes through the parts of a [`Kernel`].
//!
//! [`Kernel::real`] talks to this host. Tests hand in a simulated one and a paused clock, and get an apply
//! loop that does the same thing every time. What is not said here, the drivers cannot do.

use crate::conntrack;
use crate::ipset;
use crate::iptables;
use crate::options::Options;
use crate::routes;
use crate::sysctl;

/// One transport per subsystem.
#[derive(Debug)]
pub struct Kernel {
    /// IP sets.
    pub sets: Box<dyn ipset::Transport>,
    /// Routes of the main table and permanent neighbours.
    pub routes: Box<dyn routes::Transport>,
    /// Flows of connection tracking.
    pub flows: Box<dyn conntrack::Transport>,
    /// The save and restore programs of iptables.
    pub tables: Box<dyn iptables::Backend>,
    /// Settings below `/proc/sys`.
    pub settings: Box<dyn sysctl::Tree>,
}

impl Kernel {
    /// The kernel of this host, in the network namespace of the thread that makes the first request.
    /// Allocates; touches nothing outside the process.
    pub fn real(options: &Options) -> Self {
        Self {
            sets: Box::new(ipset::Automatic::new(options.netlink_timeout, options.program_timeout)),
            routes: Box::new(routes::Netlink::new(options.netlink_timeout, options.ipv6)),
            flows: Box::new(conntrack::Background::new(options.netlink_timeout)),
            tables: Box::new(iptables::Installed::default()),
            settings: Box::new(sysctl::Files::new(options.sysctl_root.clone())),
        }
    }
}
