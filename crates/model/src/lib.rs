//! The datastore's keys and values as types; selectors; names and hashes.
//!
//! Two layers live here and the names keep them apart: [`v3`] is exactly what is stored in etcd,
//! everything else is the internal record that the calculation graph consumes (datastore.md 1.4).
//! [`convert`] goes from the first to the second and is the only place where bad input turns into
//! "absent" ([`update::Update`] with `None`).
//!
//! Invariant: nothing in this crate does I/O, reads a clock or depends on hash-map order.

pub mod cidr;
pub mod convert;
pub mod endpoint;
pub mod family;
pub mod intern;
pub mod key;
pub mod labels;
pub mod names;
pub mod policy;
pub mod profile;
pub mod selector;
pub mod update;
pub mod v3;
pub mod validate;

pub use endpoint::{EndpointPort, HostEndpoint, NetworkSet, QosControls, WorkloadEndpoint};
pub use family::Family;
pub use key::{PolicyKey, PolicyKind, ResourceKey, WorkloadEndpointKey};
pub use labels::Labels;
pub use names::{Name, SetId};
pub use policy::{Action, EntityMatch, IcmpMatch, Policy, Port, PortRange, Protocol, Rule, ServiceRef, Tier};
pub use profile::ProfileRules;
pub use selector::Selector;
pub use update::{LinkState, Update};
