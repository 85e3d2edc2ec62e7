//! Small changes on a host where much is in force: one rule of one policy, one endpoint, the policy list
//! of one endpoint. What such a change costs must not depend on what else there is.
//!
//! Endpoint `e` has a label of group `e mod 10`, policy `p` selects group `p mod 10`, so that all
//! policies are active with ten endpoints and every endpoint has a tenth of them. Every second policy of
//! a group has the selector of the group, and these make up a policy group (netfilter.md 9.1); the
//! others have one of their own each. Every policy has five rules that refer to sets.

use std::sync::Arc;

use model::{Labels, PolicyKey, Update, WorkloadEndpoint, WorkloadEndpointKey};

use super::{HOST, endpoint, global_policy, text};
use crate::build;

/// How many groups of endpoints there are.
pub const GROUPS: u32 = 10;

/// A host before anything is changed, and the changes.
#[derive(Clone, Copy, Debug)]
pub struct Edits {
    pub policies: u32,
    pub endpoints: u32,
}

/// A host with so many active policies and local endpoints, at least ten of each.
pub const fn one_rule_edit(policies: u32, endpoints: u32) -> Edits {
    Edits { policies, endpoints }
}

impl Edits {
    /// Everything that is there before.
    pub fn start(self) -> impl Iterator<Item = Update> {
        let policies = (0..self.policies).map(|p| policy(p, 0));
        policies.chain((0..self.endpoints).map(|e| local_endpoint(e, e % GROUPS)))
    }

    /// The `n`-th change of one port in one rule of some policy; no two in a row change the same one.
    pub fn edit(self, n: u32) -> (PolicyKey, Update) {
        let p = n.wrapping_mul(7919) % self.policies;
        (policy_key(p), policy(p, 1 + n))
    }

    /// One more endpoint.
    pub fn another_endpoint(self) -> Update {
        local_endpoint(self.endpoints, 0)
    }

    /// An endpoint moves to the next group (odd `n`) or back (even `n`): another list of policies.
    pub fn moved_endpoint(self, n: u32) -> Update {
        local_endpoint(0, n % 2)
    }

    /// Name of the interface of an endpoint.
    pub fn interface(e: u32) -> String {
        format!("cali{:011x}", u64::from(e).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20)
    }
}

/// Key of the `p`-th policy: those of one group with one selector are neighbours in the order of names.
pub fn policy_key(p: u32) -> PolicyKey {
    let (group, kind) = (p % GROUPS, if is_in_group(p) { "a" } else { "b" });
    let name = format!("group-{group}-{kind}-{p:06}");
    global_policy(&name)
}

/// True for policies that are part of a policy group.
pub const fn is_in_group(p: u32) -> bool {
    (p / GROUPS).is_multiple_of(2)
}

fn policy(p: u32, version: u32) -> Update {
    let group = p % GROUPS;
    let own = if is_in_group(p) { String::new() } else { format!(" && !has(exempt-{p})") };
    let port = 1 + version % 60_000;
    let rules = [
        "allow tcp from has(marker-0) to-ports 22".to_owned(),
        format!("allow tcp from has(marker-1) to-ports 80,443,{port}"),
        format!("allow udp from has(marker-{}) to-ports 53", p % 29),
        "deny from-nets 192.0.2.0/24,2001:db8::/32".to_owned(),
        format!("allow from has(group-{group})"),
    ];
    let rules = rules.iter().map(|rule| build::rule(rule));
    super::policy(policy_key(p), &format!("has(group-{group}){own}"), rules, [build::rule("allow")])
}

fn local_endpoint(e: u32, group: u32) -> Update {
    let labels: Labels = [
        (text(&format!("group-{group}")), text("")),
        (text(&format!("marker-{}", e % 29)), text("")),
        (text("name"), text(&format!("vm-{e}"))),
    ]
    .into_iter()
    .collect();
    let key = WorkloadEndpointKey {
        host: text(HOST),
        orchestrator: text("openstack"),
        workload: text(&format!("openstack/vm-{e}")),
        endpoint: text("eth0"),
    };
    let address = std::net::Ipv4Addr::from(0x0a00_0001 + e);
    let Update::WorkloadEndpoint(key, Some(value)) =
        endpoint(key, labels, "kns.openstack", std::net::IpAddr::from(address).into())
    else {
        return Update::Ready(None);
    };
    let interface = text(&Edits::interface(e));
    Update::WorkloadEndpoint(key, Some(Arc::new(WorkloadEndpoint { interface, ..value.as_ref().clone() })))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn interfaces_differ_and_have_valid_names() {
        let names: BTreeSet<String> = (0..2_000).map(Edits::interface).collect();
        assert_eq!(names.len(), 2_000);
        assert!(names.iter().all(|name| name.len() == 15));
    }

    #[test]
    fn an_edit_changes_one_rule_and_no_selector() {
        let edits = one_rule_edit(100, 10);
        let before: Vec<Update> = edits.start().collect();
        for n in 0..100 {
            let (key, Update::Policy(_, Some(new))) = edits.edit(n) else { panic!("not a policy") };
            let is_old = |update: &&Update| matches!(update, Update::Policy(of, _) if *of == key);
            let Some(Update::Policy(_, Some(old))) = before.iter().find(is_old) else { panic!("no policy {key}") };
            let differing = old.inbound.iter().zip(&new.inbound).filter(|(old, new)| old != new).count();
            assert_eq!((differing, &old.outbound, &old.selector), (1, &new.outbound, &new.selector));
        }
    }
}
