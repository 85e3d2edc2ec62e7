//! Network sets (datastore.md C-31 to C-33).

use super::complaint::{At, Complaints, Effect};
use super::policy::check_namespace;
use crate::cidr;
use crate::endpoint::NetworkSet;
use crate::intern::Pool;
use crate::v3::{NetworkSetSpec, Resource};
use crate::validate;

const NAMESPACE: &str = "projectcalico.org/namespace";

/// Converts a stored set; `namespace` is that of the key, empty for a global set.
pub(super) fn convert(
    resource: &Resource<'_, NetworkSetSpec<'_>>,
    namespace: &str,
    pool: &mut Pool,
    complaints: &mut Complaints,
) -> Option<NetworkSet> {
    let Resource { metadata, spec } = resource;
    let root = At::root();
    let at = root.field("spec");
    let at_nets = at.field("nets");
    let mut nets = Vec::with_capacity(spec.nets.len());
    for (index, text) in spec.nets.iter().enumerate() {
        match cidr::parse_net(text) {
            Some(net) => nets.push(net),
            None => {
                complaints.add(at_nets.index(index), format_args!("{text:?} is not a network"), Effect::PartIgnored);
            }
        }
    }
    let mut profiles = Vec::new();
    if !namespace.is_empty() {
        check_namespace(namespace, &metadata.namespace, complaints);
        let profile = format!("kns.{namespace}");
        // V-6.
        if !validate::is_profile_name(&profile) {
            complaints.reject(
                root.field("metadata").field("namespace"),
                format_args!("{namespace:?} cannot be part of the name of a profile"),
            );
        }
        profiles.push(pool.name(&profile));
    }
    // The last one counts.
    let namespace = Some((NAMESPACE, namespace)).filter(|(_, namespace)| !namespace.is_empty());
    let labels = metadata.labels.iter().chain(namespace);
    let labels = labels.map(|(key, value)| (pool.name(key), pool.name(value))).collect();
    complaints.unless_rejected(NetworkSet { nets, labels, profiles })
}
