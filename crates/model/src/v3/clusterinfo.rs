//! ClusterInformation (datastore.md 3.15).

use serde::Deserialize;

use super::scalars::{objects, or_default};

/// `spec` of the cluster information.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, remote = "Self", rename_all = "camelCase")]
pub struct ClusterInformationSpec {
    #[serde(rename = "clusterGUID", deserialize_with = "or_default")]
    pub cluster_guid: String,
    #[serde(deserialize_with = "or_default")]
    pub cluster_type: String,
    #[serde(deserialize_with = "or_default")]
    pub calico_version: String,
    /// Three states; only `true` is ready (C-49).
    pub datastore_ready: Option<bool>,
    #[serde(deserialize_with = "or_default")]
    pub variant: String,
}

objects!(ClusterInformationSpec);
