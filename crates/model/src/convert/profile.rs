//! Profiles (datastore.md C-34, C-35, V-20, V-22, H-8).
//!
//! A profile is two records that are validated apart: its rules as those of policies are, and its labels
//! by the stricter rules of the API for the whole resource. So the labels can vanish while the rules
//! stay, which is reported.

use ipnet::IpNet;

use super::complaint::{At, Complaints, Effect};
use super::labels_of;
use super::rule::Rules;
use super::selectors::Selectors;
use crate::cidr;
use crate::intern::Pool;
use crate::labels::Labels;
use crate::profile::ProfileRules;
use crate::v3::policy::EntityRule;
use crate::v3::scalars::Protocol;
use crate::v3::{Meta, ProfileSpec, Resource, Rule, TextMap};
use crate::validate;

/// Words of the API, which counts their letter case, unlike the conversion.
const ACTIONS: [&str; 4] = ["Allow", "Deny", "Log", "Pass"];
const PROTOCOLS: [&str; 6] = ["TCP", "UDP", "ICMP", "ICMPv6", "SCTP", "UDPLite"];

/// Most bytes that keys and values of annotations have together.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// Returns labels and rules of a profile. The rules are `None` if one of them is invalid, which makes
/// endpoints with this profile drop. The labels are `None` if there are none or anything in the
/// resource is invalid.
pub(super) fn convert(
    resource: &Resource<'_, ProfileSpec<'_>>,
    pool: &mut Pool,
    complaints: &mut Complaints,
) -> (Option<Labels>, Option<ProfileRules>) {
    let rules = rules(&resource.spec, pool, complaints);
    let mut check = Check { complaints, passed: true };
    check.resource(resource);
    let labels = &resource.spec.labels_to_apply;
    let labels = (check.passed && rules.is_some() && !labels.is_empty()).then(|| labels_of(labels, pool));
    (labels, rules)
}

fn rules(spec: &ProfileSpec<'_>, pool: &mut Pool, complaints: &mut Complaints) -> Option<ProfileRules> {
    let root = At::root();
    let at = root.field("spec");
    let mut rules = Rules::new("", Selectors::new(pool));
    let inbound = rules.convert(&spec.ingress, at.field("ingress"), complaints);
    let outbound = rules.convert(&spec.egress, at.field("egress"), complaints);
    complaints.unless_rejected(ProfileRules { inbound, outbound })
}

/// The API's checks of the resource as it is stored, as far as the conversion of the rules has not made
/// them already.
struct Check<'a> {
    complaints: &'a mut Complaints,
    passed: bool,
}

impl Check<'_> {
    fn fail(&mut self, at: At<'_>, reason: impl std::fmt::Display) {
        self.passed = false;
        self.complaints.add(at, reason, Effect::LabelsIgnored);
    }

    fn resource(&mut self, resource: &Resource<'_, ProfileSpec<'_>>) {
        let Resource { metadata, spec } = resource;
        let root = At::root();
        self.metadata(metadata, root.field("metadata"));
        let at = root.field("spec");
        for (field, rules) in [("ingress", &spec.ingress), ("egress", &spec.egress)] {
            let at = at.field(field);
            for (index, rule) in rules.iter().enumerate() {
                self.rule(rule, at.index(index));
            }
        }
        self.labels(&spec.labels_to_apply, at.field("labelsToApply"));
    }

    /// V-20.
    fn metadata(&mut self, metadata: &Meta<'_>, at: At<'_>) {
        let Meta { name, namespace: _, labels, annotations } = metadata;
        if !validate::is_resource_name(name) {
            self.fail(at.field("name"), format_args!("{name:?} is not the name of a resource"));
        }
        let at_annotations = at.field("annotations");
        let annotations = annotations.sorted();
        for key in annotations.keys().filter(|key| !validate::is_qualified_name(&key.to_lowercase())) {
            self.fail(at_annotations, format_args!("{key:?} is not a qualified name"));
        }
        let size: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
        if size > MAX_ANNOTATIONS {
            self.fail(at_annotations, format_args!("{size} bytes where at most {MAX_ANNOTATIONS} are allowed"));
        }
        self.labels(labels, at.field("labels"));
    }

    fn labels(&mut self, labels: &TextMap<'_>, at: At<'_>) {
        for (key, value) in labels.sorted() {
            if !validate::is_qualified_name(key) {
                self.fail(at, format_args!("{key:?} is not a qualified name"));
            }
            if !validate::is_label_value(value) {
                self.fail(at, format_args!("{value:?} is not the value of a label"));
            }
        }
    }

    /// V-22.
    fn rule(&mut self, rule: &Rule<'_>, at: At<'_>) {
        if !ACTIONS.contains(&&*rule.action) {
            self.fail(at.field("action"), format_args!("{:?} where one of {ACTIONS:?} is expected", rule.action));
        }
        for (field, protocol) in [("protocol", &rule.protocol), ("notProtocol", &rule.not_protocol)] {
            if let Some(Protocol::Name(name)) = protocol
                && !PROTOCOLS.contains(&&**name)
            {
                self.fail(at.field(field), format_args!("{name:?} where one of {PROTOCOLS:?} is expected"));
            }
        }
        for (field, icmp) in [("icmp", rule.icmp), ("notICMP", rule.not_icmp)] {
            if icmp.is_some_and(|icmp| icmp.kind.is_none() && icmp.code.is_some()) {
                self.fail(at.field(field).field("code"), "a code without a type");
            }
        }
        let (mut v4, mut v6) = (false, false);
        for (field, entity) in [("source", &rule.source), ("destination", &rule.destination)] {
            self.nets(entity, at.field(field), &mut v4, &mut v6);
        }
        if v4 && v6 {
            self.fail(at, "networks of both families in one rule");
        }
        if (v4 && rule.ip_version == Some(6)) || (v6 && rule.ip_version == Some(4)) {
            self.fail(at, "networks of another family than the rule");
        }
    }

    fn nets(&mut self, entity: &EntityRule<'_>, at: At<'_>, v4: &mut bool, v6: &mut bool) {
        for (field, texts) in [("nets", &entity.nets), ("notNets", &entity.not_nets)] {
            let at = at.field(field);
            for (index, text) in texts.iter().enumerate() {
                let Some(net) = cidr::parse_net(text).filter(|_| text.contains('/')) else {
                    self.fail(at.index(index), format_args!("{text:?} is not a network with a prefix length"));
                    continue;
                };
                match net {
                    IpNet::V4(_) => *v4 = true,
                    IpNet::V6(_) => *v6 = true,
                }
                if field == "notNets" && net.prefix_len() == 0 {
                    self.fail(at.index(index), "excludes every address");
                }
            }
        }
    }
}
