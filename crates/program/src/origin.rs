//! Where a rule comes from, so that the program can explain itself.

use model::{Name, PolicyKey};

/// Seen from the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

/// The stored object a rule was rendered from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Policy { key: PolicyKey, direction: Direction, index: u32 },
    Profile { name: Name, direction: Direction, index: u32 },
}
