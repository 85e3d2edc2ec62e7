//! Builders, fakes, namespaces and servers for tests.
//!
//! A dev-dependency of anything and a dependency of `tests/` and `benches/`; never part of a release.

pub mod build;
pub mod documents;
pub mod etcd;
pub mod flows;
pub mod frames;
pub mod history;
pub mod interpret;
pub mod kernel;
pub mod naive;
pub mod netns;
pub mod packets;
pub mod replay;
pub mod scenario;
pub mod workload;
pub mod world;
