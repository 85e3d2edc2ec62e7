//! What policy says about a packet, and why, read straight from the stored objects.

pub mod packet;

pub use packet::{Connection, Direction, Packet, Side};
