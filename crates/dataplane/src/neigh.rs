//! Static neighbours.
