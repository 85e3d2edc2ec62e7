//! Tier (datastore.md 3.8).

use serde::Deserialize;

use super::scalars::{objects, or_default};

/// `spec` of a tier.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct TierSpec {
    pub order: Option<f64>,
    #[serde(deserialize_with = "or_default")]
    pub default_action: String,
}

objects!(TierSpec);
