//! The worked example of policy.md section 8, message by message.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use graph::{Batch, Graph, MemberDelta, PolicyRef, SetContents, SetMember, SetType, TierProgram};
use model::{PortRange, SetId, Update};
use testkit::build::{WepBuilder, absent, policy, policy_key, wep};
use testkit::replay::Known;

const SET: &str = "s:kFrL85XkbI3YtpgdnGWwiG2357CLyJkVu2PQ4Q";
const POLICY: &str = "np/openstack/ossg.default.5c2fe04e-1b8f-4c5f-93ab-0d7c8d1f3a21";
const GROUP: &str = "sg.projectcalico.org/openstack-5c2fe04e-1b8f-4c5f-93ab-0d7c8d1f3a21";

#[test]
fn one_security_group_through_its_life() {
    let mut graph = Graph::new("compute-1".into());
    let mut known = Known::default();
    let mut step = |updates: Vec<Update>| {
        for update in updates {
            graph.apply(update);
        }
        let batch = graph.take_batch();
        known.replay(batch.clone()).unwrap();
        batch
    };

    let local = machine("compute-1", "vm1").interface("tap1").ip("10.65.0.5");
    let remote = machine("compute-2", "vm2").ip("10.65.0.9");
    let group = security_group(&[]);

    // Messages 1 to 3.
    let batch = step(vec![group.clone(), local.clone().build(), remote.clone().build()]);
    let Batch { seq, links, sets_created, members, policies, profiles, endpoints, host_endpoints, sets_removed } =
        batch;
    assert_eq!(seq, 1);
    let contents = SetContents { kind: SetType::Net, members: nets(&["10.65.0.5/32", "10.65.0.9/32"]).into() };
    assert_eq!(sets_created, BTreeMap::from([(set(), contents)]));
    let program = policies[&policy_key(POLICY)].clone().unwrap();
    assert_eq!(policies.len(), 1);
    assert_eq!(program.tier.as_ref(), "default");
    assert_eq!(
        program.original_selector.as_ref(),
        format!("(has({GROUP}) && projectcalico.org/namespace == \"openstack\")")
    );
    let sources: Vec<Vec<&str>> =
        program.inbound.iter().map(|rule| rule.source.sets.iter().map(SetId::as_str).collect()).collect();
    assert_eq!(sources, [vec![SET], vec![SET], vec![], vec![], vec![]]);
    assert_eq!(program.inbound[2].source.nets, ["203.0.113.0/24".parse().unwrap()]);
    assert_eq!(program.inbound[2].destination.ports, [PortRange::single(22)]);
    assert_eq!(program.inbound[3].destination.ports, [PortRange { first: 6000, last: 6100 }]);
    assert_eq!(program.inbound.iter().map(|rule| rule.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(program.outbound.len(), 2);
    let endpoint = endpoints[&*Arc::<str>::from("tap1")].clone().unwrap();
    assert_eq!(endpoint.key.host.as_ref(), "compute-1");
    let listed = vec![PolicyRef { key: policy_key(POLICY), original_selector: program.original_selector.clone() }];
    assert_eq!(
        *endpoint.tiers,
        [TierProgram { name: "default".into(), ingress: listed.clone(), egress: listed, default_pass: false }]
    );
    assert!(
        host_endpoints.is_empty()
            && links.is_empty()
            && members.is_empty()
            && profiles.is_empty()
            && sets_removed.is_empty()
    );

    // Remote VM deleted.
    assert_eq!(step(vec![absent(&remote.build())]), only_members(2, &[], &["10.65.0.9/32"]));

    // New VM in the group elsewhere.
    let another = machine("compute-3", "vm3").ip("10.65.0.12").build();
    assert_eq!(step(vec![another]), only_members(3, &["10.65.0.12/32"], &[]));

    // VM gets an allowed address pair.
    let batch = step(vec![local.clone().ip("10.65.0.200").build()]);
    assert_eq!(batch.endpoints.len(), 1);
    assert_eq!(Batch { endpoints: BTreeMap::new(), ..batch }, only_members(4, &["10.65.0.200/32"], &[]));

    // Rule added to the group, no remote group.
    let batch = step(vec![security_group(&["allow v4 tcp to-ports 443"])]);
    assert_eq!(batch.policies.keys().collect::<Vec<_>>(), [&policy_key(POLICY)]);
    assert_eq!(Batch { policies: BTreeMap::new(), ..batch }, Batch { seq: 5, ..Batch::default() });

    // Local VM loses the group.
    let outside = wep("compute-1/openstack/openstack/vm1/port")
        .label("projectcalico.org/namespace=openstack")
        .interface("tap1")
        .ip("10.65.0.5")
        .build();
    let batch = step(vec![outside]);
    assert_group_gone(&batch);
    assert!(
        batch.endpoints.values().all(|endpoint| endpoint.as_ref().is_some_and(|endpoint| endpoint.tiers.is_empty()))
    );

    // Back again, and then the group is deleted while in use.
    let batch = step(vec![local.build()]);
    assert_eq!(batch.sets_created[&set()].members, nets(&["10.65.0.5/32", "10.65.0.12/32"]).into());
    let batch = step(vec![absent(&group)]);
    assert_group_gone(&batch);
    assert_eq!(batch.endpoints.len(), 1);
}

/// Three messages: endpoint, policy remove, set remove.
#[track_caller]
fn assert_group_gone(batch: &Batch) {
    assert_eq!(batch.policies, BTreeMap::from([(policy_key(POLICY), None)]));
    assert_eq!(batch.sets_removed, BTreeSet::from([set()]));
    assert_eq!(batch.endpoints.len(), 1);
    assert!(batch.sets_created.is_empty() && batch.members.is_empty() && batch.profiles.is_empty());
}

fn only_members(seq: u64, added: &[&str], removed: &[&str]) -> Batch {
    let delta = MemberDelta { added: nets(added).into(), removed: nets(removed).into() };
    Batch { seq, members: BTreeMap::from([(set(), delta)]), ..Batch::default() }
}

fn machine(host: &str, name: &str) -> WepBuilder {
    wep(&format!("{host}/openstack/openstack/{name}/port")).label("projectcalico.org/namespace=openstack").label(GROUP)
}

fn security_group(more: &[&str]) -> Update {
    let group = format!("(projectcalico.org/namespace == 'openstack') && (has({GROUP}))");
    let mut builder = policy(POLICY)
        .selector(&format!("(has({GROUP})) && projectcalico.org/namespace == 'openstack'"))
        .ingress(&format!("allow v4 from {group}"))
        .ingress(&format!("allow v6 from {group}"))
        .ingress("allow v4 protocol 6 from-nets 203.0.113.0/24 to-ports 22")
        .ingress("allow v4 protocol 17 to-ports 6000:6100")
        .ingress("allow icmp icmp-type 8,0 from-nets 0.0.0.0/0")
        .egress("allow v4")
        .egress("allow v6");
    for rule in more {
        builder = builder.ingress(rule);
    }
    builder.build()
}

fn set() -> SetId {
    SetId::from_text(SET)
}

fn nets(texts: &[&str]) -> BTreeSet<SetMember> {
    texts.iter().map(|text| SetMember::Net(text.parse().unwrap())).collect()
}
