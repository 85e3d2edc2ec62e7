//! What all resources have in common (J-1, J-4).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::scalars::{FromObject, object, objects, or_default, string_map};

/// A stored document. The key decides the type; `kind` and `apiVersion` are not looked at (J-1).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, remote = "Self")]
pub struct Resource<S: Default> {
    #[serde(deserialize_with = "or_default")]
    pub metadata: Meta,
    // The bound is spelled out because the function, not the derive, calls for it.
    #[serde(deserialize_with = "or_default", bound(deserialize = "S: Deserialize<'de> + Default"))]
    pub spec: S,
}

/// `metadata`, as far as the agent reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct Meta {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub namespace: String,
    #[serde(deserialize_with = "string_map")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "string_map")]
    pub annotations: BTreeMap<String, String>,
}

objects!(Meta);

impl<'de, S: Deserialize<'de> + Default> FromObject<'de> for Resource<S> {
    fn from_object<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The inherent function of the derive.
        Self::deserialize(deserializer)
    }
}

impl<'de, S: Deserialize<'de> + Default> Deserialize<'de> for Resource<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        object(deserializer)
    }
}
