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
mod object;
pub mod policy;
pub mod profile;
pub mod scalars;
pub mod text;
pub mod tier;

use std::borrow::Cow;

use serde::Deserialize;

pub use clusterinfo::ClusterInformationSpec;
pub use config::FelixConfigurationSpec;
pub use endpoint::{HostEndpointSpec, WorkloadEndpointSpec};
pub use meta::{Meta, Resource};
pub use networkset::NetworkSetSpec;
pub use policy::{EntityRule, PolicySpec, Rule};
pub use profile::ProfileSpec;
pub use text::{Text, TextMap};
pub use tier::TierSpec;

/// Returns the text of a stored value: bytes that are not UTF-8 become replacement characters, as the usual
/// writers' own libraries read them.
pub fn text(value: &[u8]) -> Cow<'_, str> {
    // Checking is many times faster than replacing.
    std::str::from_utf8(value).map_or_else(|_| String::from_utf8_lossy(value), Cow::Borrowed)
}

/// Parses a stored document; what comes out borrows from the text.
///
/// Of a key that occurs twice the last one counts, as in the writers' libraries.
///
/// # Errors
///
/// If the document is not JSON or a known field has a wrong type.
pub fn parse<'a, T: Deserialize<'a> + Default>(text: &'a str) -> Result<Resource<'a, T>, serde_json::Error> {
    serde_json::from_str(text)
}

#[cfg(test)]
mod tests;
