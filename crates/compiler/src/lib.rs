//! Turns graph output into programs.

pub mod marks;
pub mod options;

use graph::Batch;
use program::Changes;

pub use marks::Marks;
pub use options::Options;

/// Something in a batch that cannot be programmed, for the operator's log.
#[derive(Clone, Debug, PartialEq)]
pub struct Complaint {
    /// What the operator finds in the datastore, e.g. `np/openstack/ossg…`.
    pub object: String,
    pub reason: String,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Compiler {}

impl Compiler {
    pub fn new(_options: Options) -> Self {
        unimplemented!()
    }

    /// Returns the changes that bring the kernel to the state after this batch. The first call
    /// returns a complete program.
    pub fn compile(&mut self, _batch: &Batch) -> (Changes, Vec<Complaint>) {
        unimplemented!()
    }
}
