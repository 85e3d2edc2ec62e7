//! Profile (datastore.md 3.10).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::policy::Rule;
use super::scalars::{objects, or_default, string_map};

/// `spec` of a profile.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct ProfileSpec {
    #[serde(deserialize_with = "or_default")]
    pub ingress: Vec<Rule>,
    #[serde(deserialize_with = "or_default")]
    pub egress: Vec<Rule>,
    #[serde(deserialize_with = "string_map")]
    pub labels_to_apply: BTreeMap<String, String>,
}

objects!(ProfileSpec);
