//! NetworkSet and GlobalNetworkSet (datastore.md 3.9).

use serde::Deserialize;

use super::scalars::{objects, or_default};

/// `spec` of both kinds of network set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct NetworkSetSpec {
    #[serde(deserialize_with = "or_default")]
    pub nets: Vec<String>,
}

objects!(NetworkSetSpec);
