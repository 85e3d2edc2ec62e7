//! Host endpoints (datastore.md C-9 to C-11, V-4, V-5).

use std::net::IpAddr;

use super::complaint::{At, Complaints, Effect};
use super::{endpoint, labels_of};
use crate::cidr;
use crate::endpoint::HostEndpoint;
use crate::intern::Pool;
use crate::v3::{HostEndpointSpec, Resource};
use crate::validate;

/// Says what the packets of the endpoint are marked with (C-10).
const DSCP_ANNOTATION: &str = "qos.projectcalico.org/dscp";

/// Converts a stored endpoint; `None` if it is invalid.
pub(super) fn convert(
    resource: &Resource<'_, HostEndpointSpec<'_>>,
    pool: &mut Pool,
    complaints: &mut Complaints,
) -> Option<HostEndpoint> {
    let Resource { metadata, spec } = resource;
    let root = At::root();
    let at = root.field("spec");
    if spec.node.is_empty() {
        complaints.reject(at.field("node"), "the endpoint is of no host");
    }
    if !validate::is_host_interface(&spec.interface_name) {
        let reason = format_args!("{:?} is neither empty nor * nor the name of an interface", spec.interface_name);
        complaints.reject(at.field("interfaceName"), reason);
    }
    let (mut expected_v4, mut expected_v6) = (Vec::new(), Vec::new());
    let at_expected = at.field("expectedIPs");
    for (index, text) in spec.expected_ips.iter().enumerate() {
        match cidr::parse_ip(text) {
            Some(IpAddr::V4(address)) => expected_v4.push(address),
            Some(IpAddr::V6(address)) => expected_v6.push(address),
            None => {
                let reason = format_args!("{text:?} is not an address");
                complaints.add(at_expected.index(index), reason, Effect::PartIgnored);
            }
        }
    }
    let at_profiles = at.field("profiles");
    for (index, name) in spec.profiles.iter().enumerate().filter(|(_, name)| !validate::is_profile_name(name)) {
        complaints.reject(at_profiles.index(index), format_args!("{name:?} is not the name of a profile"));
    }
    let at_ports = at.field("ports");
    let ports = spec.ports.iter().enumerate();
    let ports =
        ports.filter_map(|(index, stored)| endpoint::port(stored, pool, at_ports.index(index), complaints)).collect();
    let dscp = metadata.annotations.get(DSCP_ANNOTATION).and_then(|text| {
        let dscp = dscp(text);
        if dscp.is_none() {
            let reason = format_args!("{DSCP_ANNOTATION}: {text:?} is not a DSCP");
            complaints.add(root.field("metadata").field("annotations"), reason, Effect::PartIgnored);
        }
        dscp
    });
    complaints.unless_rejected(HostEndpoint {
        host: pool.name(&spec.node),
        interface: pool.name(&spec.interface_name),
        expected_v4,
        expected_v6,
        profiles: spec.profiles.iter().map(|name| pool.name(name)).collect(),
        labels: labels_of(&metadata.labels, pool),
        ports,
        dscp,
    })
}

/// Reads a DSCP: a number from 0 to 63, or one of the names of J-5 in any letter case.
fn dscp(text: &str) -> Option<u8> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().filter(|number| *number < 64);
    }
    let digit =
        |byte: &u8, most: u8| char::from(*byte).to_digit(10).and_then(|d| u8::try_from(d).ok()).filter(|d| *d <= most);
    match text.to_ascii_uppercase().as_bytes() {
        b"DF" => Some(0),
        b"EF" => Some(46),
        // Class and drop precedence.
        [b'A', b'F', class, drop] => {
            let (class, drop) = (digit(class, 4)?, digit(drop, 3)?);
            (class > 0 && drop > 0).then_some(8 * class + 2 * drop)
        }
        [b'C', b'S', class] => Some(8 * digit(class, 6)?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dscp_is_a_number_or_a_name() {
        let cases = [
            ("0", Some(0)),
            ("63", Some(63)),
            ("64", None),
            ("256", None),
            ("", None),
            ("-1", None),
            ("DF", Some(0)),
            ("ef", Some(46)),
            ("AF11", Some(10)),
            ("af43", Some(38)),
            ("AF23", Some(22)),
            ("AF44", None),
            ("AF01", None),
            ("AF10", None),
            ("AF51", None),
            ("CS0", Some(0)),
            ("Cs6", Some(48)),
            ("CS7", None),
            ("CS", None),
        ];
        for (text, expected) in cases {
            assert_eq!(dscp(text), expected, "{text:?}");
        }
    }
}
