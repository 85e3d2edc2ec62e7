//! What the Neutron driver really writes (datastore.md section 9).

use std::collections::BTreeMap;

use super::*;
use crate::family::Family;
use crate::policy::{IcmpMatch, Port, PortRange, Protocol};

const SG_A: &str = "e350d892-1f57-474c-91ea-e7eda90f5c8b";
const SG_B: &str = "eca4fc86-6615-4ae5-aeb9-08ddc03a0ac8";
const ZOO: &str = "a8bf21d1-a85c-4d67-85aa-bd2e25ed4804";

#[test]
fn every_captured_document_is_converted() {
    let folder = format!("{}/../../tests/vectors/neutron_etcd", env!("CARGO_MANIFEST_DIR"));
    let mut n_converted = 0;
    for folder in [folder.clone(), format!("{folder}/dns"), format!("{folder}/region")] {
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let is_data = path.extension().is_some_and(|extension| extension == "json" || extension == "jsonl");
            if !is_data || ["ids.json", "index.json"].iter().any(|name| path.ends_with(name)) {
                continue;
            }
            let content = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
            let entries: Vec<Value> = match serde_json::from_str::<Vec<Value>>(&content) {
                Ok(entries) => entries,
                Err(_) => content.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
            };
            for entry in entries {
                let Some(key) = ResourceKey::parse(text(&entry["key"]).as_bytes()) else { continue };
                assert_eq!(key.to_string(), text(&entry["key"]));
                let converted = convert(&key, entry["value"].as_str().map(str::as_bytes), &STRICT);
                assert!(!converted.updates.is_empty(), "{key}");
                n_converted += 1;
            }
        }
    }
    assert_eq!(n_converted, 695);
}

#[test]
fn four_ports_in_two_groups() {
    let state = State::of("08-ports-up");
    assert_eq!(state.complaints, []);
    assert_eq!(state.rejected, [""; 0]);
    assert_eq!(state.policies.keys().collect::<Vec<_>>(), [SG_A, SG_B]);
    for (group, policy) in &state.policies {
        let selector =
            format!("(has(sg.projectcalico.org/openstack-{group}) && projectcalico.org/namespace == \"openstack\")");
        assert_eq!((&*policy.tier, policy.order, policy.ingress, policy.egress), ("default", None, true, true));
        assert_eq!(*policy.original_selector, selector);
        let [icmp, ssh] = policy.inbound.as_slice() else { panic!() };
        let from = icmp.source.selector.as_ref().unwrap().canonical();
        assert_eq!(
            from,
            format!("(projectcalico.org/namespace == \"openstack\" && has(sg.projectcalico.org/openstack-{group}))")
        );
        assert_eq!((&icmp.protocol, icmp.family), (&Some(Protocol::Name("icmp".into())), Some(Family::V4)));
        assert_eq!(ssh.protocol, Some(Protocol::Number(6)));
        assert_eq!(ssh.source.nets, ["0.0.0.0/0".parse().unwrap()]);
        assert_eq!((&ssh.source.selector, &ssh.destination.ports), (&None, &vec![Port::Range(PortRange::single(22))]));
        let families: Vec<_> = policy.outbound.iter().map(|rule| (rule.action, rule.family)).collect();
        assert_eq!(families, [(Action::Allow, Some(Family::V4)), (Action::Allow, Some(Family::V6))]);
    }
    let endpoints: Vec<_> =
        state.endpoints.iter().map(|(key, value)| (key.as_str(), value.as_ref().unwrap())).collect();
    assert_eq!(
        endpoints.iter().map(|(key, endpoint)| (*key, &*endpoint.interface)).collect::<Vec<_>>(),
        [
            (
                "compute-1/openstack/openstack/000000d8-0000-4000-8000-000000000008/5e3e6620-c10f-4f82-8425-db885f1d7ae2",
                "tap5e3e6620-c1"
            ),
            (
                "compute-1/openstack/openstack/000000d9-0000-4000-8000-000000000009/36a8b174-6f32-4fff-8ecc-05007e17b663",
                "tap36a8b174-6f"
            ),
            (
                "compute-2/openstack/openstack/000000da-0000-4000-8000-00000000000a/c2956674-4716-4c71-9c66-5cef43b97af2",
                "tapc2956674-47"
            ),
            (
                "compute-2/openstack/openstack/000000db-0000-4000-8000-00000000000b/c5729d1d-be73-4209-820d-a7901fc62f83",
                "tapc5729d1d-be"
            ),
        ]
    );
    for ((_, endpoint), (address, own, other)) in endpoints.iter().zip([
        ("10.65.0.11/32", SG_A, SG_B),
        ("10.65.0.21/32", SG_B, SG_A),
        ("10.65.0.12/32", SG_A, SG_B),
        ("10.65.0.22/32", SG_B, SG_A),
    ]) {
        assert_eq!(endpoint.v4_nets, [address.parse().unwrap()]);
        assert_eq!((endpoint.v6_nets.len(), endpoint.profiles.len(), endpoint.labels.len()), (0, 0, 8));
        assert!(state.policies[own].selector.matches(&endpoint.labels));
        assert!(!state.policies[other].selector.matches(&endpoint.labels));
    }
    assert!(state.updates.contains(&Update::Ready(Some(true))));
    let felix = [("EndpointReportingEnabled", "true"), ("InterfacePrefix", "tap")]
        .map(|(name, text)| (name.to_owned(), text.to_owned()));
    let source = ConfigSource::FelixConfiguration("default".into());
    assert!(state.updates.contains(&Update::Config(source, Some(Arc::new(felix.into())))));
}

#[test]
fn groups_with_a_rule_that_cannot_be_are_rejected_whole() {
    let state = State::of("15-rule-odd");
    assert_eq!(state.policies.keys().collect::<Vec<_>>(), [ZOO, SG_A, SG_B]);
    // O-17.
    assert_eq!(
        state.complaints,
        [
            ("9aabd366-4476-4cd8-ba57-5075e6386f35", "spec.ingress[1].protocol"), // "any" as number 0
            ("b5a8f4bf-d702-456c-9fc9-9ccda5e15258", ""),                         // 58 with ports "128:0"
            ("c89f3b2c-3deb-4201-9de8-7c34e9991ac1", ""),                         // 1 with ports "8:None"
            ("d1b853bc-be13-4821-ae7f-a2cea2323567", "spec.ingress[1].destination.ports"), // UDPLite with ports
            ("ddaeb845-951f-4e5f-8a6a-0cd576469932", "spec.ingress[1].protocol"), // "0"
        ]
        .map(|(group, field)| (group.to_owned(), field.to_owned(), Effect::Rejected))
    );
    assert_eq!(state.rejected.len(), 5);

    let zoo = &state.policies[ZOO];
    assert_eq!((zoo.inbound.len(), zoo.outbound.len()), (12, 4));
    let icmp: Vec<_> = zoo.inbound.iter().filter_map(|rule| Some((rule.family?, rule.icmp?))).collect();
    assert_eq!(
        icmp,
        [
            (Family::V4, IcmpMatch { kind: 8, code: None }),
            (Family::V4, IcmpMatch { kind: 3, code: Some(4) }),
            (Family::V6, IcmpMatch { kind: 128, code: Some(0) }),
        ]
    );
    assert_eq!(zoo.inbound[8].protocol, Some(Protocol::Number(50)));
    assert_eq!(zoo.outbound[2].destination.ports, [Port::Range(PortRange { first: 80, last: 81 })]);
}

#[test]
fn an_allowed_address_pair_with_a_prefix_closes_the_endpoint() {
    let state = State::of("18-allowed-address-pairs");
    let closed: Vec<_> =
        state.endpoints.iter().filter(|(_, endpoint)| endpoint.is_none()).map(|(key, _)| key).collect();
    assert_eq!(closed.len(), 1);
    assert!(closed[0].ends_with("/36a8b174-6f32-4fff-8ecc-05007e17b663"), "{closed:?}");
    assert!(state.complaints.iter().any(|(_, field, _)| field == "spec.ipNetworks[2]"), "{:?}", state.complaints);
}

#[test]
fn a_dual_stack_port_has_addresses_of_both_families() {
    let state = State::of("21-port-dual-stack");
    assert_eq!(state.endpoints.len(), 5);
    let nets: Vec<_> = state
        .endpoints
        .values()
        .map(|endpoint| endpoint.as_ref().unwrap())
        .map(|endpoint| (endpoint.v4_nets.len(), endpoint.v6_nets.len()))
        .collect();
    assert_eq!(nets, [(1, 1), (1, 1), (1, 2), (1, 1), (1, 1)]);
    let (key, port) = state.endpoints.iter().nth(2).unwrap();
    let port = port.as_ref().unwrap();
    assert!(key.ends_with("/1b16ad98-2c5d-4b14-8db1-88433e7b49f4"), "{key}");
    assert_eq!(port.v4_nets, ["10.65.0.63/32".parse().unwrap()]);
    assert_eq!(
        port.v6_nets,
        ["fd00:66::338/128".parse().unwrap(), "fd00:65::f816:3eff:fe45:c513/128".parse().unwrap()]
    );
    assert_eq!(port.mac, Some([0xfa, 0x16, 0x3e, 0x45, 0xc5, 0x13]));
}

#[test]
fn damage_costs_only_what_is_damaged() {
    let state = State::of("44-damaged");
    assert_eq!(state.policies.keys().collect::<Vec<_>>(), [SG_A, SG_B]);
    assert_eq!(
        state.rejected,
        [
            "9aabd366-4476-4cd8-ba57-5075e6386f35", // not JSON
            "b5a8f4bf-d702-456c-9fc9-9ccda5e15258",
            "c89f3b2c-3deb-4201-9de8-7c34e9991ac1",
            "d1b853bc-be13-4821-ae7f-a2cea2323567",
            "ddaeb845-951f-4e5f-8a6a-0cd576469932",
            "ffffffff-0000-4000-8000-000000000000", // stray copy of a group with protocol 0
        ]
    );
    assert_eq!(state.endpoints.len(), 3);
    assert!(state.endpoints.values().all(Option::is_some));
}

/// The records of one captured state; groups are named by their UUID.
#[derive(Debug, Default)]
struct State {
    policies: BTreeMap<String, Arc<Policy>>,
    rejected: Vec<String>,
    endpoints: BTreeMap<String, Option<Arc<crate::endpoint::WorkloadEndpoint>>>,
    updates: Vec<Update>,
    complaints: Vec<(String, String, Effect)>,
}

impl State {
    fn of(name: &str) -> Self {
        let mut state = Self::default();
        for entry in vectors(&format!("neutron_etcd/{name}.json")).as_array().unwrap() {
            let Some(key) = ResourceKey::parse(text(&entry["key"]).as_bytes()) else { continue };
            let Converted { updates, complaints } = convert(&key, Some(text(&entry["value"]).as_bytes()), &STRICT);
            let name = if let ResourceKey::Policy(key) = &key {
                key.name.replace("ossg.default.", "")
            } else {
                key.to_string()
            };
            for complaint in complaints {
                state.complaints.push((name.clone(), complaint.field, complaint.effect));
            }
            for update in updates {
                if let Update::Policy(_, Some(policy)) = &update {
                    state.policies.insert(name.clone(), Arc::clone(policy));
                } else if let Update::Policy(_, None) = &update {
                    state.rejected.push(name.clone());
                } else if let Update::WorkloadEndpoint(key, endpoint) = &update {
                    state.endpoints.insert(key.to_string(), endpoint.clone());
                }
                state.updates.push(update);
            }
        }
        state
    }
}
