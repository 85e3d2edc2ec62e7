//! Small containers that carry the bookkeeping of the stages.
//!
//! They know nothing of networks. Hash maps appear in them for look-up only; whatever is iterated is
//! ordered, or its order cannot reach the output.

mod bytes;
mod column;
mod counted;
mod groups;
mod ids;
mod intern;
mod links;
mod order;
mod pending;
mod recent;
mod strings;
mod table;

pub(crate) use bytes::Bytes;
pub(crate) use column::Column;
pub(crate) use counted::Counted;
pub(crate) use groups::Groups;
pub(crate) use ids::{IdSet, IdSets};
pub(crate) use intern::Interner;
pub(crate) use links::Links;
pub(crate) use order::sort_numbers;
pub(crate) use pending::{Pending, PendingById};
pub(crate) use recent::{Recent, Shelf};
pub(crate) use strings::{Strings, words};
pub(crate) use table::{make_room, shrink};

/// Hash of values that come from outside: seeded anew in every process.
pub(crate) type Seed = foldhash::fast::RandomState;

/// Look-up by numbers that we assigned ourselves.
pub(crate) type IdMap<K, V> = hashbrown::HashMap<K, V, rustc_hash::FxBuildHasher>;

/// Look-up by values that come from outside.
pub(crate) type ValueMap<K, V> = hashbrown::HashMap<K, V, Seed>;
