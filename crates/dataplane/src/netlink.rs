//! Blocking netlink sockets.
