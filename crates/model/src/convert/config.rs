//! Configuration resources (datastore.md C-43 to C-49).

use std::collections::BTreeMap;

use crate::v3::{ClusterInformationSpec, FelixConfigurationSpec, Resource};

/// Annotations that set a parameter to their text, whatever the fields say (C-46).
const ANNOTATION_PREFIX: &str = "config.projectcalico.org/";

/// Only this one describes the cluster.
pub(super) fn is_used_cluster_information(name: &str) -> bool {
    name == "default"
}

/// Returns the parameters and the ready flag.
pub(super) fn convert_cluster_information(
    resource: Resource<'_, ClusterInformationSpec<'_>>,
) -> (BTreeMap<String, String>, Option<bool>) {
    let ClusterInformationSpec { cluster_guid, cluster_type, calico_version, datastore_ready, variant } = resource.spec;
    let parameters = [
        ("ClusterGUID", cluster_guid),
        ("ClusterType", cluster_type),
        ("CalicoVersion", calico_version),
        ("Variant", variant),
    ];
    let parameters = parameters.into_iter().filter(|(_, text)| !text.is_empty());
    (parameters.map(|(name, text)| (name.to_owned(), text.into())).collect(), datastore_ready)
}

/// Returns the parameters: fields, overridden by annotations.
pub(super) fn convert_felix_configuration(resource: Resource<'_, FelixConfigurationSpec>) -> BTreeMap<String, String> {
    let mut parameters: BTreeMap<String, String> =
        resource.spec.parameters.into_iter().map(|(name, text)| (name.to_owned(), text)).collect();
    // In the order of the keys: of two that differ in case alone, the outcome must not depend on the writer's order.
    for (key, text) in resource.metadata.annotations.sorted() {
        if let Some(name) = key.strip_prefix(ANNOTATION_PREFIX).filter(|name| !name.is_empty()) {
            // Names of parameters are compared without case (C-48).
            parameters.retain(|known, _| !known.eq_ignore_ascii_case(name));
            parameters.insert(name.to_owned(), text.to_owned());
        }
    }
    parameters
}
