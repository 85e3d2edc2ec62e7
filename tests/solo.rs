//! One compute host and etcd: what a test needs that looks at an agent's kernel and sends no packets.
//!
//! The interfaces of the host's machines exist and lead to a namespace where nobody is. The agent has an xtables lock
//! of its own, so that a test may hold it without holding up anybody else on this machine.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use model::Family;
use serde_json::json;
use tempfile::TempDir;
use testkit::netns::{Netns, scratch};

use crate::agent::{Agent, Start, Variant};
use crate::bed::Fabric;
use crate::data::{self, Content, Machine, PORTS_UP, SG_A, content, dual_stack, edit, policy_key};
use crate::knobs::ghost_like;
use crate::store::Store;

/// The host's name in etcd.
pub const HOST: &str = "compute-1";

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Solo {
    // Dropped in this order: what uses the namespaces goes before them.
    content: Content,
    before: String,
    directory: TempDir,
    host: Netns,
    _yard: Netns,
    fabric: Fabric,
}

impl Solo {
    /// Makes the host with what Neutron wrote for the acceptance test, in both families, and loads it.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn new() -> Result<Self> {
        Self::with(dual_stack(&content(PORTS_UP)?)?)
    }

    /// Makes the host with other content.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn with(content: Content) -> Result<Self> {
        let fabric = Fabric::new()?;
        let host = fabric.host(HOST, 11)?;
        let yard = Netns::new("yard")?;
        let directory = scratch()?;
        File::create(directory.path().join("lock"))?;
        let before =
            format!("touch /run/xtables.lock; mount --bind {}/lock /run/xtables.lock", directory.path().display());
        let solo = Self { content, before, directory, host, _yard: yard, fabric };
        for machine in solo.machines() {
            solo.plug(&machine)?;
        }
        solo.store().load(&solo.content)?;
        Ok(solo)
    }

    /// Makes the interface of a machine.
    ///
    /// # Errors
    ///
    /// If it exists.
    pub fn plug(&self, machine: &Machine) -> Result<()> {
        let tap = &machine.tap;
        self.host.veth(tap, &self._yard, tap)?;
        self._yard.sh(&format!("ip link set {tap} up"))?;
        self.host.sh(&format!("ip link set {tap} up"))?;
        self.host.await_up(tap)
    }

    /// Returns etcd.
    #[must_use]
    pub fn store(&self) -> &Store {
        self.fabric.store()
    }

    /// Returns the network that etcd is on.
    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Returns the namespace of the host.
    #[must_use]
    pub fn host(&self) -> &Netns {
        &self.host
    }

    /// Returns what was loaded at first.
    #[must_use]
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// Returns the machines of the host.
    #[must_use]
    pub fn machines(&self) -> Vec<Machine> {
        data::machines(&self.content).into_iter().filter(|machine| machine.host == HOST).collect()
    }

    /// Returns the agent's xtables lock.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.directory.path().join("lock")
    }

    /// Returns a directory for what the test wants to keep; it goes with the host.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Returns how the agent is started.
    #[must_use]
    pub fn agent(&self, variant: Variant) -> Start<'_> {
        let (netns, etcd) = (&self.host, self.store().endpoint());
        Start { netns, host: HOST, etcd, variant, path_prefix: None, settings: &[], before: &self.before }
    }

    /// Starts the agent and waits until everything wanted is in force.
    ///
    /// # Errors
    ///
    /// If it cannot be started or does not get there within a minute.
    pub fn start(&self, start: &Start<'_>) -> Result<Agent> {
        let agent = Agent::start(start)?;
        agent.await_line("in sync: everything wanted is in force", std::time::Duration::from_secs(60))?;
        Ok(agent)
    }
}

/// Returns machines like the first one of compute-1 that exist in etcd only, on a host of this name.
///
/// # Errors
///
/// If there is no machine on compute-1 to copy.
pub fn ghosts(content: &Content, host: &str, count: usize) -> Result<Vec<(String, String)>> {
    let machine = data::machines(content).into_iter().find(|machine| machine.host == HOST).context("a machine")?;
    let value = content.get(&machine.key).context("its endpoint")?;
    (0..count).map(|number| ghost_like(&machine.key, value, host, number)).collect()
}

/// Returns groups that every machine of sg-a is in, with so many IPv4 rules each; each rule is two in the kernel. The
/// first rule of the first group tells the `edition`: it allows 198.51.`edition`.0/24.
///
/// # Errors
///
/// If sg-a is not in `content`.
pub fn groups(content: &Content, count: usize, rules: usize, edition: u8) -> Result<Vec<(String, String)>> {
    groups_of(content, Family::V4, count, rules, edition)
}

/// As [`groups`], of either family; in IPv6 the first rule allows 2001:db8:`edition`::/64.
///
/// # Errors
///
/// If sg-a is not in `content`.
pub fn groups_of(
    content: &Content,
    family: Family,
    count: usize,
    rules: usize,
    edition: u8,
) -> Result<Vec<(String, String)>> {
    let base = content.get(&policy_key(SG_A)).context("sg-a")?;
    let net = |number: usize, rule: usize| match (family, number + rule) {
        (Family::V4, 0) => format!("198.51.{edition}.0/24"),
        (Family::V6, 0) => format!("2001:db8:{edition}::/64"),
        (Family::V4, _) => format!("10.{}.{}.{}/32", 128 + rule / 256, rule % 256, number % 256),
        (Family::V6, _) => format!("fd00:128:{rule:x}::{number:x}/128"),
    };
    let group = |number: usize| {
        let name = format!("big-{number:04}");
        let rule = |rule: usize| {
            json!({"action": "Allow", "ipVersion": family.digit(), "protocol": 6, "source": {"nets": [net(number, rule)]},
                "destination": {"ports": [1000 + rule % 1000]}})
        };
        let value = edit(base, |object| {
            object["metadata"]["name"] = json!(format!("ossg.default.{name}"));
            object["spec"]["ingress"] = (0..rules).map(rule).collect();
            Ok(())
        })?;
        Ok((policy_key(&name), value))
    };
    (0..count).map(group).collect()
}
