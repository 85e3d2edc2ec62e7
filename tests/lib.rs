//! What tests of several crates together share: above all the end-to-end tests' bed, which is hosts and virtual machines
//! as network namespaces, a real etcd, real agents and real packets.
//!
//! `tests/tests/*.rs` and the demonstration (`tests/bin/demo.rs`) are written with it. What a machine is called, where
//! it runs and what it may do comes from what Neutron wrote ([`data`]); the [`table`] says which packets must pass.
//!
//! Invariant: everything happens in namespaces that the bed makes, and goes with it.

pub mod agent;
pub mod bed;
pub mod data;
pub mod ground;
pub mod in_process;
pub mod kernel;
pub mod knobs;
pub mod locks;
pub mod proxy;
#[allow(clippy::unwrap_used, reason = "a test helper that meets something unexpected fails its test")]
pub mod rule_text;
pub mod services;
pub mod solo;
pub mod stamp;
pub mod store;
pub mod stream;
pub mod table;
pub mod traffic;
pub mod watch;
pub mod worlds;
