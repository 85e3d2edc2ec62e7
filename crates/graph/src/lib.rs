//! Which facts follow from the current datastore, incrementally.

pub mod batch;

pub use batch::{
    Batch, EndpointProgram, MemberDelta, PolicyProgram, PolicyRef, ProfileProgram, RuleProgram, SetContents, SetMember,
    SetType, SideProgram, TierProgram,
};

use model::{Name, Update};

/// The calculation graph. See the [module documentation](self).
#[derive(Debug)]
pub struct Graph {}

impl Graph {
    /// Makes an empty graph for the host of this name (datastore.md 1.4: compared byte for byte).
    pub fn new(_host: Name) -> Self {
        unimplemented!()
    }

    /// Takes one change of a fact. Any order is fine (S-14).
    pub fn apply(&mut self, _update: Update) {
        unimplemented!()
    }

    /// Everything that changed since the last call, each object at most once. Deterministic (I10).
    pub fn take_batch(&mut self) -> Batch {
        unimplemented!()
    }
}
