//! Load on an agent: objects in etcd that take one form after another, none of which matters to the streams of
//! [`traffic`](crate::traffic).
//!
//! Invariant: whatever forms the objects have, machines of sg-a reach one another by echo requests and no machine of the
//! other group does. So what is allowed and what is forbidden is so before and after every change, and has to be so in
//! between.

use anyhow::{Context as _, Result, ensure};
use model::Family;
use serde_json::{Value, json};

use crate::bed::Vm;
use crate::data::{self, Content, Event, Machine, SG_A, SG_B, edit, policy_key, ssh_rule_replaced};
use crate::store::Store;

/// Machines that exist in etcd only: on compute-1, and on a host that does not exist.
const GHOSTS: usize = 8;

/// A group that exists in some forms of the objects only.
const SG_X: &str = "77777777-7777-4777-8777-777777777777";

/// One object and the values it can have; the first is the one it has at first.
#[derive(Clone, Debug)]
struct Knob {
    key: String,
    forms: Vec<Option<String>>,
    now: usize,
}

/// See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Knobs {
    knobs: Vec<Knob>,
}

impl Knobs {
    /// Finds what can be turned in `content`, which has to be dual-stack.
    ///
    /// # Errors
    ///
    /// If `content` is not what the bed is made of.
    pub fn new(content: &Content) -> Result<Self> {
        let machines = data::machines(content);
        let machine = |vm: Vm| {
            let found = machines.iter().find(|machine| machine.addresses.contains(&vm.address().into()));
            found.with_context(|| format!("no endpoint for {}", vm.name()))
        };
        let (a1, b1) = (machine(Vm::A1)?, machine(Vm::B1)?);
        let mut knobs = vec![
            group(content, SG_A, &[a1, machine(Vm::A2)?])?,
            group(content, SG_B, &[b1, machine(Vm::B2)?])?,
            third_group(content)?,
            labels(content, &a1.key)?,
            labels(content, &b1.key)?,
        ];
        for number in 0..GHOSTS {
            knobs.push(ghost(content, a1, b1, "compute-1", number)?);
            knobs.push(ghost(content, a1, b1, "compute-9", number)?);
        }
        Ok(Self { knobs })
    }

    /// Gives one object another form.
    ///
    /// # Errors
    ///
    /// The store's.
    pub fn turn(&mut self, store: &Store, dice: &mut fastrand::Rng) -> Result<()> {
        let knob = dice.usize(..self.knobs.len());
        let knob = self.knobs.get_mut(knob).context("a knob")?;
        let step = dice.usize(1..knob.forms.len());
        knob.set(store, (knob.now + step) % knob.forms.len())
    }

    /// Gives every object its first form again.
    ///
    /// # Errors
    ///
    /// The store's.
    pub fn reset(&mut self, store: &Store) -> Result<()> {
        self.knobs.iter_mut().filter(|knob| knob.now != 0).try_for_each(|knob| knob.set(store, 0))
    }

    /// Gives every object its last form, which is the largest.
    ///
    /// # Errors
    ///
    /// The store's.
    pub fn all(&mut self, store: &Store) -> Result<()> {
        self.knobs.iter_mut().try_for_each(|knob| knob.set(store, knob.forms.len() - 1))
    }
}

impl Knob {
    fn new(key: &str, forms: Vec<Option<String>>) -> Self {
        Self { key: key.to_owned(), forms, now: 0 }
    }

    fn set(&mut self, store: &Store, form: usize) -> Result<()> {
        match self.forms.get(form).context("a form")? {
            Some(value) => store.put(&self.key, value)?,
            None => store.delete(&self.key)?,
        }
        self.now = form;
        Ok(())
    }
}

fn has_group(group: &str) -> String {
    format!("has(sg.projectcalico.org/openstack-{group})")
}

/// A group whose members may be named by label or by address, with other rules beside it.
fn group(content: &Content, group: &str, members: &[&Machine]) -> Result<Knob> {
    let key = policy_key(group);
    let base = content.get(&key).with_context(|| key.clone())?;
    let nets = |family| members.iter().filter_map(move |machine| machine.address(family)).map(|net| net.to_string());
    let by_address = edit(base, |object| {
        for rule in object["spec"]["ingress"].as_array_mut().context("ingress")? {
            if rule["source"].get("selector").is_some() {
                let family = if rule["ipVersion"] == 4 { Family::V4 } else { Family::V6 };
                rule["source"] = json!({"nets": nets(family).collect::<Vec<_>>()});
            }
        }
        Ok(())
    })?;
    let longer = edit(base, |object| {
        let rules = object["spec"]["ingress"].as_array_mut().context("ingress")?;
        let ports: Vec<u16> = (0..40).map(|number| 3000 + 2 * number).collect();
        for (version, other) in [(4, SG_A), (6, SG_A), (4, SG_B), (6, SG_B), (4, SG_X), (6, SG_X)] {
            let allow = json!({"action": "Allow", "ipVersion": version, "protocol": 6,
                "source": {"selector": has_group(other)}, "destination": {"ports": ports}});
            rules.insert(0, allow);
        }
        Ok(())
    })?;
    let mut forms = vec![Some(base.clone())];
    if group == SG_A {
        let Event::Put(_, replaced) = ssh_rule_replaced(content)? else { anyhow::bail!("a rule is replaced by a put") };
        forms.push(Some(replaced));
    }
    forms.extend([Some(by_address), Some(longer)]);
    Ok(Knob::new(&key, forms))
}

/// A group that comes and goes.
fn third_group(content: &Content) -> Result<Knob> {
    let base = content.get(&policy_key(SG_B)).context("sg-b")?;
    let value = edit(base, |object| {
        object["metadata"]["name"] = json!(format!("ossg.default.{SG_X}"));
        object["spec"]["selector"] = json!(has_group(SG_X));
        object["spec"]["ingress"] = json!([{"action": "Allow", "ipVersion": 4, "protocol": 6,
            "destination": {"ports": [8080]}, "source": {"selector": has_group(SG_X)}}]);
        Ok(())
    })?;
    Ok(Knob::new(&policy_key(SG_X), vec![None, Some(value)]))
}

/// An endpoint that is in the third group too, or not.
fn labels(content: &Content, key: &str) -> Result<Knob> {
    let base = content.get(key).with_context(|| key.to_owned())?;
    let more = edit(base, |object| {
        object["metadata"]["labels"][format!("sg.projectcalico.org/openstack-{SG_X}")] = json!("sg-x");
        Ok(())
    })?;
    Ok(Knob::new(key, vec![Some(base.clone()), Some(more)]))
}

/// A machine that is in one group, in the other, or gone.
fn ghost(content: &Content, a1: &Machine, b1: &Machine, host: &str, number: usize) -> Result<Knob> {
    let like = |machine: &Machine| {
        let value = content.get(&machine.key).context("the endpoint")?;
        ghost_like(&machine.key, value, host, number)
    };
    let ((key, as_a), (same, as_b)) = (like(a1)?, like(b1)?);
    ensure!(key == same, "{key} is not {same}");
    Ok(Knob::new(&key, vec![None, Some(as_a), Some(as_b)]))
}

/// Returns key and value of a machine like another.
///
/// # Errors
///
/// If that is no endpoint as Neutron writes it.
pub fn ghost_like(key: &str, value: &str, host: &str, number: usize) -> Result<(String, String)> {
    let (folder, _) = key.rsplit_once('/').context("a key with a folder")?;
    let escaped = host.replace('-', "--");
    let name = format!("{escaped}-openstack-ghost{number:04}-port{number:04}");
    let (high, low) = (number / 200, number % 200 + 50);
    let place = u8::from(host != "compute-1");
    let value = edit(value, |object| {
        object["metadata"]["name"] = json!(name);
        let spec = &mut object["spec"];
        for (field, value) in [
            ("node", Value::from(host)),
            ("workload", Value::from(format!("ghost{number:04}"))),
            ("endpoint", Value::from(format!("port{number:04}"))),
            ("interfaceName", Value::from(format!("tapghost{number:04}"))),
            ("mac", Value::from(format!("fa:16:3e:ff:{high:02x}:{low:02x}"))),
            (
                "ipNetworks",
                json!([
                    format!("10.{}.{high}.{low}/32", 66 + place),
                    format!("fd00:65::{}:{number:x}/128", 66 + place)
                ]),
            ),
        ] {
            spec[field] = value;
        }
        Ok(())
    })?;
    Ok((format!("{folder}/{name}"), value))
}
