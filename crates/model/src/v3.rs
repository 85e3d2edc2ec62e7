//! Exactly what is stored in etcd (datastore.md sections 2, 3).
//!
//! Fed by the bytes of a value, read only by [`crate::convert`]. These types know JSON and nothing
//! else: a missing field and `null` are the zero value (J-2), unknown fields are ignored, a wrong type in
//! a known field makes the document unparsable (J-3). Meaning is the business of the conversion.

pub mod clusterinfo;
pub mod config;
pub mod endpoint;
pub mod meta;
pub mod networkset;
pub mod policy;
pub mod profile;
pub mod scalars;
pub mod tier;

use serde::de::DeserializeOwned;

pub use clusterinfo::ClusterInformationSpec;
pub use config::FelixConfigurationSpec;
pub use endpoint::{HostEndpointSpec, WorkloadEndpointSpec};
pub use meta::{Meta, Resource};
pub use networkset::NetworkSetSpec;
pub use policy::{EntityRule, PolicySpec, Rule};
pub use profile::ProfileSpec;
pub use tier::TierSpec;

/// Parses a stored document.
///
/// Bytes that are not UTF-8 become replacement characters, and of a key that occurs twice the last one
/// counts, both as the usual writers' own libraries read it.
///
/// # Errors
///
/// If the document is not JSON or a known field has a wrong type.
pub fn parse<T: DeserializeOwned + Default>(value: &[u8]) -> Result<Resource<T>, serde_json::Error> {
    let text = String::from_utf8_lossy(value);
    serde_json::from_str(&text).or_else(|first| {
        // The direct way refuses a repeated key; going through a tree keeps the last one. Only such
        // documents, and broken ones, pay for it.
        let tree: serde_json::Value = serde_json::from_str(&text)?;
        serde_json::from_value(tree).map_err(|_| first)
    })
}

#[cfg(test)]
mod tests;
