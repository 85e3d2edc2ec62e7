//! Policies (datastore.md C-20 to C-27, V-7).

use super::complaint::{At, Complaints, Effect};
use super::rule::Rules;
use super::selectors::Selectors;
use crate::intern::Pool;
use crate::key::{PolicyKey, PolicyKind};
use crate::policy::Policy;
use crate::v3::policy::PolicySpec;
use crate::v3::{Meta, Resource, Text};

const DEFAULT_TIER: &str = "default";

/// The only performance hint there is.
const ASSUME_NEEDED: &str = "AssumeNeededOnEveryNode";

/// Holds what the user wrote, in releases that store policies under longer names (C-26).
const METADATA_ANNOTATION: &str = "projectcalico.org/metadata";

/// Converts a stored policy; `None` if it is invalid.
pub(super) fn convert(
    resource: &Resource<'_, PolicySpec<'_>>,
    key: &PolicyKey,
    pool: &mut Pool,
    complaints: &mut Complaints,
) -> Option<Policy> {
    let Resource { metadata, spec } = resource;
    let root = At::root();
    let at = root.field("spec");
    check_metadata(metadata, complaints);
    let mut selectors = Selectors::new(pool);
    let is_global = key.kind == PolicyKind::GlobalNetworkPolicy;
    let selector = if is_global {
        selectors.of_global_policy(spec, at, complaints)
    } else {
        check_namespace(&key.namespace, &metadata.namespace, complaints);
        selectors.of_network_policy(spec, &key.namespace, at, complaints)
    };
    let (ingress, egress) = directions(&spec.types, at.field("types"), complaints);
    check_hints(&spec.performance_hints, at.field("performanceHints"), complaints);
    let mut rules = Rules::new(&key.namespace, selectors);
    let inbound = rules.convert(&spec.ingress, at.field("ingress"), complaints);
    let outbound = rules.convert(&spec.egress, at.field("egress"), complaints);
    let selector = selector?;
    complaints.unless_rejected(Policy {
        tier: pool.name(if spec.tier.is_empty() { DEFAULT_TIER } else { &spec.tier }),
        order: spec.order,
        // The text parses, so its normalised form (L-24) is the canonical one.
        original_selector: pool.name(&selector.canonical()),
        selector,
        ingress,
        egress,
        // C-22: these exist for global policies only.
        do_not_track: is_global && spec.do_not_track,
        pre_dnat: is_global && spec.pre_dnat,
        apply_on_forward: is_global && spec.apply_on_forward,
        always_needed: spec.performance_hints.iter().any(|hint| *hint == ASSUME_NEEDED),
        inbound,
        outbound,
    })
}

/// H-4: the namespace of the key counts. Rejects a namespace that cannot stand between quotes.
pub(super) fn check_namespace(of_key: &str, of_document: &str, complaints: &mut Complaints) {
    let root = At::root();
    let at = root.field("metadata");
    if of_key.contains('\'') {
        complaints.reject(at.field("namespace"), format_args!("{of_key:?} cannot be the name of a namespace"));
    }
    if of_key != of_document {
        let reason = format_args!("{of_document:?} differs from {of_key:?} in the key, which counts");
        complaints.add(at.field("namespace"), reason, Effect::PartIgnored);
    }
}

/// C-26: the annotation is not used, but if it does not parse the document counts as unparsable.
fn check_metadata(metadata: &Meta<'_>, complaints: &mut Complaints) {
    let Some(text) = metadata.annotations.get(METADATA_ANNOTATION).filter(|text| !text.is_empty()) else { return };
    if let Err(error) = serde_json::from_str::<Meta<'_>>(text) {
        let root = At::root();
        let at = root.field("metadata");
        complaints.reject(at.field("annotations"), format_args!("{METADATA_ANNOTATION} does not parse: {error}"));
    }
}

/// Returns the directions that a policy governs: ingress, egress (policy.md T-6).
fn directions(types: &[Text<'_>], at: At<'_>, complaints: &mut Complaints) -> (bool, bool) {
    if types.is_empty() {
        return (true, true);
    }
    let (mut ingress, mut egress) = (false, false);
    for (index, word) in types.iter().enumerate() {
        if word.eq_ignore_ascii_case("ingress") {
            ingress = true;
        } else if word.eq_ignore_ascii_case("egress") {
            egress = true;
        } else {
            complaints.add(at.index(index), format_args!("{word:?} is not a direction"), Effect::PartIgnored);
        }
    }
    (ingress, egress)
}

/// V-7.
fn check_hints(hints: &[Text<'_>], at: At<'_>, complaints: &mut Complaints) {
    for (index, hint) in hints.iter().enumerate() {
        if *hint != ASSUME_NEEDED {
            complaints.reject(at.index(index), format_args!("{hint:?} is not a performance hint"));
        } else if index > 0 {
            complaints.reject(at.index(index), format_args!("{hint:?} is repeated"));
        }
    }
}
