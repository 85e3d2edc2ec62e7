//! The packet filter, through iptables' save and restore programs.

pub mod features;
pub mod hash;
pub mod render;
