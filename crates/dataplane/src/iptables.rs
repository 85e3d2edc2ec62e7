//! The packet filter, through iptables' save and restore programs.
