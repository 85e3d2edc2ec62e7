//! What Neutron wrote into etcd: the vectors of `tests/vectors/neutron_etcd`, and what the bed needs of them.
//!
//! Feeds the bed (which machines there are) and the tests (what to write). Pure, apart from reading the vectors.
//! Invariant: what is derived here (dual-stack data, the follow-up changes) is written the way Neutron writes it; where
//! a vector of the same change exists, a test holds the derived value against it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use model::Family;
use serde_json::{Value, json};

/// The content of an etcd: key to value.
pub type Content = BTreeMap<String, String>;

/// What all values of the Calico data model are stored under.
const RESOURCES: &str = "/calico/resources/v3/projectcalico.org";

/// The step of the vectors that has the four ports up: the acceptance test's set-up (openstack.md 14).
pub const PORTS_UP: &str = "08-ports-up";

/// The gateway of the demo network (openstack.md 14; the IPv6 one is that of vector 20).
#[must_use]
pub fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 65, 0, 1]),
        Family::V6 => IpAddr::from([0xfd00, 0x65, 0, 0, 0, 0, 0, 1]),
    }
}

/// One change of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key has this value.
    Put(String, String),
    /// The key is gone.
    Delete(String),
}

/// One step of the vectors.
#[derive(Clone, Debug)]
pub struct Step {
    /// The name of its files, for example `08-ports-up`.
    pub name: String,
    /// What happens in it, in words.
    pub what: String,
}

/// One virtual machine, as its endpoint in etcd describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The key of the endpoint.
    pub key: String,
    /// The host that it runs on.
    pub host: String,
    /// The interface of the host that leads to it.
    pub tap: String,
    /// The MAC address of the machine.
    pub mac: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Whether there is one that cannot be read, so that the whole endpoint counts as absent (datastore.md C-4).
    pub damaged: bool,
}

fn directory() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/neutron_etcd"))
}

fn read(name: &str) -> Result<String> {
    let path = directory().join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Returns the etcd content after a step.
///
/// # Errors
///
/// If there is no such vector.
pub fn content(step: &str) -> Result<Content> {
    let entries: Vec<Value> = serde_json::from_str(&read(&format!("{step}.json"))?)?;
    entries.iter().map(|entry| Ok((text(entry, "key")?, text(entry, "value")?))).collect()
}

/// Returns the changes that a step consists of, in order.
///
/// # Errors
///
/// If there is no such vector.
pub fn events(step: &str) -> Result<Vec<Event>> {
    let lines = read(&format!("{step}.events.jsonl"))?;
    lines
        .lines()
        .map(|line| {
            let event: Value = serde_json::from_str(line)?;
            let key = text(&event, "key")?;
            match text(&event, "type")?.as_str() {
                "PUT" => Ok(Event::Put(key, text(&event, "value")?)),
                "DELETE" => Ok(Event::Delete(key)),
                other => bail!("{step}: an event of type {other}"),
            }
        })
        .collect()
}

/// Returns all steps in order.
///
/// # Errors
///
/// If the index of the vectors cannot be read.
pub fn steps() -> Result<Vec<Step>> {
    let index: Vec<Value> = serde_json::from_str(&read("index.json")?)?;
    index
        .iter()
        .map(|step| {
            let file = text(step, "file")?;
            let name = file.strip_suffix(".json").context("a step's file is a .json file")?.to_owned();
            Ok(Step { name, what: text(step, "what")? })
        })
        .collect()
}

fn text(value: &Value, field: &str) -> Result<String> {
    Ok(value.get(field).and_then(Value::as_str).with_context(|| format!("{field} in {value}"))?.to_owned())
}

/// Returns the machines whose endpoints are in `content`, in the order of their keys; damaged values are no machines.
#[must_use]
pub fn machines(content: &Content) -> Vec<Machine> {
    let prefix = format!("{RESOURCES}/workloadendpoints/");
    let endpoints = content.iter().filter(|(key, _)| key.starts_with(&prefix));
    endpoints.filter_map(|(key, value)| machine(key, value)).collect()
}

fn machine(key: &str, value: &str) -> Option<Machine> {
    let value: Value = serde_json::from_str(value).ok()?;
    let spec = value.get("spec")?;
    let networks = spec.get("ipNetworks")?.as_array()?;
    let address = |network: &Value| {
        let (address, length) = network.as_str()?.split_once('/')?;
        length.parse::<u8>().ok()?;
        address.parse().ok()
    };
    let mut addresses: Vec<IpAddr> = networks.iter().filter_map(address).collect();
    addresses.sort();
    let damaged = addresses.len() < networks.len();
    Some(Machine {
        key: key.to_owned(),
        host: text(spec, "node").ok()?,
        tap: text(spec, "interfaceName").ok()?,
        mac: text(spec, "mac").ok()?,
        addresses,
        damaged,
    })
}

impl Machine {
    /// Returns the first address of a family.
    #[must_use]
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == (family == Family::V4))
    }
}

/// Returns the content as it is when network demo also has the SLAAC subnet fd00:65::/64 of vectors 20 and 21.
///
/// Every port has the address that follows from its MAC, like port vm-c1 there, and every group has its rules once more
/// for IPv6, as Neutron writes them for the ethertype IPv6.
///
/// # Errors
///
/// If a value is not what Neutron writes.
pub fn dual_stack(content: &Content) -> Result<Content> {
    let subnets = self::content("20-ipv6-subnets")?.into_iter().filter(|(key, _)| key.contains("/subnet/"));
    let mut dual = content.clone();
    dual.extend(subnets);
    for (key, value) in &mut dual {
        if key.starts_with(&format!("{RESOURCES}/workloadendpoints/")) {
            *value = edit(value, |object| {
                let spec = &mut object["spec"];
                let mac = text(spec, "mac")?;
                spec["ipv6Gateway"] = json!(gateway(Family::V6));
                let networks = spec["ipNetworks"].as_array_mut().context("ipNetworks")?;
                networks.push(json!(format!("{}/128", slaac(&mac)?)));
                Ok(())
            })?;
        } else if key.starts_with(&format!("{RESOURCES}/networkpolicies/")) {
            *value = edit(value, |object| {
                let rules = object["spec"]["ingress"].as_array_mut().context("ingress")?;
                let more: Vec<Value> = rules.iter().map(for_ipv6).collect();
                rules.extend(more);
                Ok(())
            })?;
        }
    }
    Ok(dual)
}

/// Returns the rule that Neutron writes for ethertype IPv6 where it writes `rule` for IPv4.
fn for_ipv6(rule: &Value) -> Value {
    let mut rule = rule.clone();
    rule["ipVersion"] = json!(6);
    if rule["protocol"] == "ICMP" {
        rule["protocol"] = json!("ICMPv6");
    }
    if rule["source"]["nets"] == json!(["0.0.0.0/0"]) {
        rule["source"]["nets"] = json!(["::/0"]);
    }
    rule
}

/// Returns the address that a machine with this MAC gives itself in fd00:65::/64 (RFC 4291, appendix A).
///
/// # Errors
///
/// If `mac` is no MAC address.
pub fn slaac(mac: &str) -> Result<Ipv6Addr> {
    let bytes = mac.split(':').map(|byte| u16::from_str_radix(byte, 16)).collect::<Result<Vec<u16>, _>>()?;
    let [a, b, c, d, e, f] = bytes[..] else { bail!("{mac} is no MAC address") };
    Ok(Ipv6Addr::new(0xfd00, 0x65, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f))
}

/// Returns a value after `change` has been made to the object in it.
///
/// # Errors
///
/// If the value is no JSON, or as `change`.
pub fn edit(value: &str, change: impl FnOnce(&mut Value) -> Result<()>) -> Result<String> {
    let mut object: Value = serde_json::from_str(value)?;
    change(&mut object)?;
    Ok(object.to_string())
}

/// The ids of the two groups (`ids.json`).
pub const SG_A: &str = "e350d892-1f57-474c-91ea-e7eda90f5c8b";
/// See [`SG_A`].
pub const SG_B: &str = "eca4fc86-6615-4ae5-aeb9-08ddc03a0ac8";

/// Returns the key of a group's policy.
#[must_use]
pub fn policy_key(group: &str) -> String {
    format!("{RESOURCES}/networkpolicies/openstack/ossg.default.{group}")
}

/// Returns the follow-up "sg-a's SSH rule replaced by tcp 2222–2230 from 10.0.0.0/8" (vector 13), likewise for IPv6.
///
/// # Errors
///
/// If the group is not in `content`.
pub fn ssh_rule_replaced(content: &Content) -> Result<Event> {
    let key = policy_key(SG_A);
    let value = edit(content.get(&key).context("sg-a")?, |object| {
        for rule in object["spec"]["ingress"].as_array_mut().context("ingress")? {
            if rule["destination"]["ports"] == json!([22]) {
                rule["destination"]["ports"] = json!(["2222:2230"]);
                let net = if rule["ipVersion"] == 4 { "10.0.0.0/8" } else { "fd00::/8" };
                rule["source"]["nets"] = json!([net]);
            }
        }
        Ok(())
    })?;
    Ok(Event::Put(key, value))
}

/// Returns the change of group sg-a from "ICMP from the group itself" to "ICMP from sg-b" (the demonstration's change).
///
/// # Errors
///
/// If the group is not in `content`.
pub fn icmp_from_other_group(content: &Content) -> Result<Event> {
    let key = policy_key(SG_A);
    let value = edit(content.get(&key).context("sg-a")?, |object| {
        for rule in object["spec"]["ingress"].as_array_mut().context("ingress")? {
            if rule["source"].get("selector").is_some() {
                rule["source"]["selector"] = json!(format!("has(sg.projectcalico.org/openstack-{SG_B})"));
            }
        }
        Ok(())
    })?;
    Ok(Event::Put(key, value))
}

/// Returns the follow-up "b1 moved to sg-a" (vector 16): the endpoint at `key` has the labels of sg-a only.
///
/// # Errors
///
/// If the endpoint is not in `content`.
pub fn moved_to_sg_a(content: &Content, key: &str) -> Result<Event> {
    let value = edit(content.get(key).context("the endpoint")?, |object| {
        let labels = object["metadata"]["labels"].as_object_mut().context("labels")?;
        labels.remove(&format!("sg.projectcalico.org/openstack-{SG_B}"));
        labels.remove("sg-name.projectcalico.org/openstack-sg-b");
        labels.insert(format!("sg.projectcalico.org/openstack-{SG_A}"), json!("sg-a"));
        labels.insert("sg-name.projectcalico.org/openstack-sg-a".to_owned(), json!(SG_A));
        Ok(())
    })?;
    Ok(Event::Put(key.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(event: &Event) -> (String, Value) {
        match event {
            Event::Put(key, value) => (key.clone(), serde_json::from_str(value).unwrap()),
            Event::Delete(key) => (key.clone(), Value::Null),
        }
    }

    #[test]
    fn the_vectors_have_forty_seven_steps_in_order_and_four_machines_at_ports_up() {
        let steps = steps().unwrap();
        assert_eq!(steps.len(), 47);
        for (number, step) in steps.iter().enumerate() {
            assert!(step.name.starts_with(&format!("{number:02}-")), "{}", step.name);
            events(&step.name).unwrap();
        }
        let machines = machines(&content(PORTS_UP).unwrap());
        let seen: Vec<_> = machines.iter().map(|vm| (vm.addresses[0].to_string(), vm.host.as_str())).collect();
        let expected = [
            ("10.65.0.11", "compute-1"),
            ("10.65.0.21", "compute-1"),
            ("10.65.0.12", "compute-2"),
            ("10.65.0.22", "compute-2"),
        ];
        assert_eq!(seen, expected.map(|(address, host)| (address.to_owned(), host)));
        assert_eq!((machines[0].tap.as_str(), machines[0].mac.as_str()), ("tap5e3e6620-c1", "fa:16:3e:02:e2:75"));
    }

    #[test]
    fn a_machine_gives_itself_the_ipv6_address_that_neutron_computed() {
        let vectors = content("21-port-dual-stack").unwrap();
        let seen = machines(&vectors).into_iter().find(|vm| vm.tap == "tap1b16ad98-2c").unwrap();
        assert!(seen.addresses.contains(&slaac(&seen.mac).unwrap().into()), "{seen:?}");
    }

    #[test]
    fn a_machine_with_an_address_that_cannot_be_read_is_damaged() {
        let damaged = |step| machines(&content(step).unwrap()).iter().filter(|vm| vm.damaged).count();
        assert_eq!(damaged("18-allowed-address-pairs"), 1); // 10.65.1.0/24/32
        assert_eq!(damaged("19-allowed-address-pairs-off"), 0);
    }

    #[test]
    fn follow_ups_are_what_neutron_wrote_for_them() {
        let ports_up = content(PORTS_UP).unwrap();
        let written = events("13-rule-updated").unwrap();
        assert_eq!(parsed(&ssh_rule_replaced(&ports_up).unwrap()), parsed(written.last().unwrap()));

        let b1 = machines(&ports_up)[1].key.clone();
        let written = events("16-port-moved-group").unwrap();
        assert_eq!(parsed(&moved_to_sg_a(&ports_up, &b1).unwrap()), parsed(written.last().unwrap()));
    }

    #[test]
    fn dual_stack_data_has_every_rule_and_every_port_in_both_families() {
        let dual = dual_stack(&content(PORTS_UP).unwrap()).unwrap();
        for vm in machines(&dual) {
            assert!(vm.address(Family::V4).is_some() && vm.address(Family::V6).is_some(), "{vm:?}");
        }
        let policy: Value = serde_json::from_str(&dual[&policy_key(SG_B)]).unwrap();
        let rules = policy["spec"]["ingress"].as_array().unwrap();
        let own = format!("has(sg.projectcalico.org/openstack-{SG_B})");
        assert_eq!(rules.len(), 4);
        assert_eq!(
            rules[2..],
            [
                json!({"action": "Allow", "ipVersion": 6, "protocol": "ICMPv6", "source": {"selector": own}}),
                json!({"action": "Allow", "ipVersion": 6, "protocol": 6, "destination": {"ports": [22]},
                       "source": {"nets": ["::/0"]}}),
            ]
        );
    }
}
