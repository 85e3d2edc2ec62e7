//! Sets of both families (netfilter.md 17).
//!
//! Fed with the set fields of a batch, feeds the `sets` of the changes and tells the rule renderer
//! which sets exist.
//!
//! Invariant: a set exists in every programmed family or in none, whichever families its members have;
//! a member goes to the set of its own family.

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::RandomState;
use graph::{MemberDelta, MemberList, SetContents, SetMember, SetType};
use ipnet::IpNet;
use model::{Family, SetId};
use program::{Changes, Member, Members, SetChange, SetKind, SetName, SetSpec};

use crate::Complaint;
use crate::names;
use crate::options::Options;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct Sets {
    /// Those whose names the kernel takes, with these. Every reference of a rule is looked up here.
    known: HashMap<SetId, Vec<(Family, SetName)>, RandomState>,
    /// Read by the names in which the dataplane knows them, to notice two ids with one cut name.
    by_name: BTreeMap<SetName, SetId>,
}

impl Sets {
    pub fn exists(&self, id: &SetId) -> bool {
        self.known.contains_key(id)
    }

    /// The kernel name of a set that exists.
    pub fn name(&self, id: &SetId, family: Family) -> Option<&SetName> {
        self.known.get(id)?.iter().find(|(of, _)| *of == family).map(|(_, name)| name)
    }

    /// Makes a set that the program itself names and that has no members yet.
    pub fn create_fixed(&self, options: &Options, family: Family, id: &str, kind: SetKind, changes: &mut Changes) {
        let name = names::fixed_set(id, family);
        let spec = SetSpec { name: name.clone(), family, kind, max_members: options.max_set_size };
        changes.sets.insert((family, name), SetChange::Replace { spec, members: Members::default() });
    }

    pub fn create(
        &mut self,
        options: &Options,
        id: &SetId,
        contents: &SetContents,
        changes: &mut Changes,
        complaints: &mut Vec<Complaint>,
    ) {
        let Some(names) = self.claim(options, id, complaints) else { return };
        for (family, name) in names {
            let kind = match contents.kind {
                SetType::Net => SetKind::Net,
                SetType::AddressPort => SetKind::AddressPort,
            };
            let spec = SetSpec { name: name.clone(), family, kind, max_members: options.max_set_size };
            let members = of_family(&contents.members, family, contents.kind);
            changes.sets.insert((family, name), SetChange::Replace { spec, members });
        }
    }

    pub fn change(&self, id: &SetId, delta: &MemberDelta, changes: &mut Changes) {
        // Of one that could not be created this was told already.
        for (family, name) in self.known.get(id).into_iter().flatten() {
            let part = |members: &MemberList| -> Members {
                let members = members.iter().map(|known| member(&known));
                members.filter(|member| member.family() == *family && fits(member)).collect()
            };
            let (added, removed) = (part(&delta.added), part(&delta.removed));
            if !added.is_empty() || !removed.is_empty() {
                changes.sets.insert((*family, name.clone()), SetChange::Delta { added, removed });
            }
        }
    }

    pub fn remove(&mut self, id: &SetId, changes: &mut Changes) {
        for (family, name) in self.known.remove(id).into_iter().flatten() {
            self.by_name.remove(&name);
            changes.sets.insert((family, name), SetChange::Remove);
        }
    }

    /// Returns the kernel names of a set unless the kernel refuses them or another set has them.
    fn claim(
        &mut self,
        options: &Options,
        id: &SetId,
        complaints: &mut Vec<Complaint>,
    ) -> Option<Vec<(Family, SetName)>> {
        let names: Vec<_> = kernel_names(options, id).collect();
        let taken = names.iter().any(|(_, name)| self.by_name.get(name).is_some_and(|owner| owner != id));
        if names.len() < options.families().len() || taken {
            let reason = if taken { "another set has the same kernel name" } else { "it has no valid kernel name" };
            let reason = format!("the set is not made: {reason}");
            complaints.push(Complaint { object: format!("set {id:?}"), reason });
            return None;
        }
        self.by_name.extend(names.iter().map(|(_, name)| (name.clone(), id.clone())));
        self.known.insert(id.clone(), names.clone());
        Some(names)
    }
}

fn kernel_names(options: &Options, id: &SetId) -> impl Iterator<Item = (Family, SetName)> {
    options.families().iter().filter_map(|family| Some((*family, SetName::new(&id.kernel_name(*family))?)))
}

/// The members of one family that the kernel takes. Those of another kind than the set's it would refuse
/// with everything else of their batch.
fn of_family(members: &MemberList, family: Family, kind: SetType) -> Members {
    let of_kind = |member: &SetMember| match (kind, member) {
        (SetType::Net, SetMember::Net(_)) | (SetType::AddressPort, SetMember::AddressPort { .. }) => true,
        (SetType::Net, SetMember::AddressPort { .. }) | (SetType::AddressPort, SetMember::Net(_)) => false,
    };
    members
        .iter()
        .filter(of_kind)
        .map(|known| member(&known))
        .filter(|member| member.family() == family && fits(member))
        .collect()
}

/// The kernel refuses networks of length 0, and 0.0.0.0 and :: except as a network. No packet that has
/// ports has these addresses, but an endpoint in the datastore may.
fn fits(member: &Member) -> bool {
    match member {
        Member::Net(net) => net.prefix_len() > 0,
        Member::Address(address) | Member::AddressPort { address, .. } => !address.is_unspecified(),
    }
}

fn member(member: &SetMember) -> Member {
    match *member {
        SetMember::Net(net) => Member::Net(IpNet::trunc(&net)),
        SetMember::AddressPort { address, protocol, port } => Member::AddressPort { address, protocol, port },
    }
}
