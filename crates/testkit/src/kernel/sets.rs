//! IP sets, with the answers that the kernel gives to each operation on them.

use std::collections::BTreeSet;

use dataplane::ipset::transport::{Contents, Header, Headers, Op, SetError};
use model::Family;
use program::{Member, SetKind, SetName};

use super::State;
use super::faults::Fault;

/// A set as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    pub kind: SetKind,
    pub family: Family,
    pub max_members: u32,
    pub members: BTreeSet<Member>,
    /// Somebody else's, of a type that we never make.
    pub foreign_type: Option<&'static str>,
}

impl Set {
    fn type_name(&self) -> &'static str {
        self.foreign_type.unwrap_or(match self.kind {
            SetKind::Address => "hash:ip",
            SetKind::Net => "hash:net",
            SetKind::AddressPort => "hash:ip,port",
        })
    }

    fn header(&self) -> Header {
        Header {
            type_name: self.type_name().to_owned(),
            family: Some(self.family),
            max_members: Some(self.max_members),
            special: self.foreign_type.is_some(),
            members: u32::try_from(self.members.len()).ok(),
        }
    }

    fn contents(&self, complete: bool) -> Contents {
        let shown = |(n, member): (usize, &Member)| (complete || n.is_multiple_of(2)).then_some(*member);
        Contents {
            type_name: self.type_name().to_owned(),
            family: Some(self.family),
            max_members: Some(self.max_members),
            odd: self.foreign_type.is_some(),
            members: self.members.iter().enumerate().filter_map(shown).collect(),
            complete,
        }
    }
}

impl State {
    /// Names of all sets; half of them with the fault.
    pub(super) fn set_names(&self, complete: bool) -> Vec<String> {
        let shown = |(n, name): (usize, &String)| (complete || n.is_multiple_of(2)).then(|| name.clone());
        self.sets.keys().enumerate().filter_map(shown).collect()
    }

    /// Headers of all sets of ours; of half of them with the fault.
    pub(super) fn set_headers(&self, complete: bool) -> Headers {
        let mut headers = Headers { complete, ..Headers::default() };
        for name in self.set_names(complete) {
            let ours = SetName::new(&name).filter(|_| is_ours(&name)).zip(self.sets.get(&name));
            match ours {
                Some((known, set)) => drop(headers.ours.insert(known, set.header())),
                None => headers.others += 1,
            }
        }
        headers
    }

    pub(super) fn set_contents(&self, name: &SetName, complete: bool) -> Option<Contents> {
        self.sets.get(name.as_str()).map(|set| set.contents(complete))
    }

    /// Performs one operation; on failure says how many members were handled before.
    pub fn perform_set(&mut self, op: &Op, fault: Option<Fault>) -> Result<(), (usize, SetError)> {
        let missing = || (0, SetError::Missing);
        match op {
            Op::Create { name, kind, family, max_members, hash_size: _ } => {
                if self.sets.contains_key(name.as_str()) {
                    return Err((0, SetError::Exists));
                }
                let members = BTreeSet::new();
                let set = Set { kind: *kind, family: *family, max_members: *max_members, members, foreign_type: None };
                self.sets.insert(name.as_str().to_owned(), set);
                self.set_changed(name.as_str());
            }
            Op::Add { set: name, members } => {
                // Messages are cut into pieces, and what came before a failure stays.
                let cut = fault.map_or(usize::MAX, |_| members.len() / 2);
                let set = self.sets.get_mut(name.as_str()).ok_or_else(missing)?;
                let mut outcome = Ok(());
                for (done, member) in members.iter().enumerate() {
                    if done == cut {
                        outcome = Err((done, SetError::Lost("cut".to_owned())));
                        break;
                    }
                    if let Err(error) = add(set, member) {
                        outcome = Err((done, error));
                        break;
                    }
                }
                self.set_changed(name.as_str());
                outcome?;
            }
            Op::Remove { set: name, members } => {
                let set = self.sets.get_mut(name.as_str()).ok_or_else(missing)?;
                for member in members.iter() {
                    set.members.remove(&member);
                }
                self.set_changed(name.as_str());
            }
            Op::Swap { set, with } => {
                if [set, with].into_iter().any(|name| self.in_reading.as_deref() == Some(name.as_str())) {
                    return Err((0, SetError::Busy));
                }
                let (a, b) = (self.sets.get(set.as_str()), self.sets.get(with.as_str()));
                let (a, b) = a.cloned().zip(b.cloned()).ok_or_else(missing)?;
                if (a.kind, a.family, a.foreign_type) != (b.kind, b.family, b.foreign_type) {
                    return Err((0, SetError::TypesDiffer));
                }
                self.sets.insert(set.as_str().to_owned(), b);
                self.sets.insert(with.as_str().to_owned(), a);
                self.set_changed(set.as_str());
                self.set_changed(with.as_str());
            }
            Op::Destroy { set: name } => {
                if self.is_set_busy(name.as_str()) {
                    return Err((0, SetError::Busy));
                }
                self.sets.remove(name.as_str());
                self.set_changed(name.as_str());
            }
        }
        Ok(())
    }

    /// Whether the set cannot be destroyed: a rule names it, or the agent is in the middle of reading it.
    pub(super) fn is_set_busy(&self, name: &str) -> bool {
        self.in_reading.as_deref() == Some(name) || self.is_set_in_use(name)
    }

    /// Whether a rule of any table of any variant names the set.
    pub fn is_set_in_use(&self, name: &str) -> bool {
        self.tables.values().any(|table| table.names_set(name))
    }
}

/// Whether a set is an agent's, by its name.
pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with("cali") || name.starts_with("felix-")
}

fn add(set: &mut Set, member: Member) -> Result<(), SetError> {
    if set.members.contains(&member) {
        return Ok(());
    }
    let fits = match (set.kind, member) {
        (SetKind::Address, Member::Address(address)) | (SetKind::AddressPort, Member::AddressPort { address, .. }) => {
            !address.is_unspecified()
        }
        (SetKind::Net, Member::Net(net)) => net.prefix_len() > 0 && net.trunc() == net,
        _ => false,
    };
    if !fits || member.family() != set.family {
        return Err(SetError::Member("invalid".to_owned()));
    }
    if set.members.len() >= set.max_members as usize {
        return Err(SetError::Full);
    }
    set.members.insert(member);
    Ok(())
}
