//! ClusterInformation (datastore.md 3.15).

use super::object::objects;
use super::text::Text;

objects! {
    /// `spec` of the cluster information.
    pub struct ClusterInformationSpec<'a> {
        "clusterGUID" cluster_guid: Text<'a>,
        "clusterType" cluster_type: Text<'a>,
        "calicoVersion" calico_version: Text<'a>,
        /// Three states; only `true` is ready (C-49).
        "datastoreReady" datastore_ready: Option<bool>,
        "variant" variant: Text<'a>,
    }
}
