//! What is wanted of each set, what the kernel is known to have, and the operations between the two.
//!
//! Fed by the set driver with wishes, readings and outcomes; gives it operations. Pure.
//!
//! Invariants: per set, what the kernel has is `members - missing + surplus` while `kernel` is
//! [`Kernel::Read`]; `missing` is a subset of `members`, `surplus` has none of them. Additions
//! contain a removal only where no rule has to change between the two (policy.md M-33). Nothing is planned for a set
//! whose contents are not known, except what creates it. A set is never written that cannot hold all its members.

use std::collections::BTreeSet;
use std::time::Instant;

use ipnet::IpNet;
use model::Family;
use program::{Member, Members, SetKind, SetName, SetSpec};

use super::members::Tree;
use super::transport::{Contents, Header, Op};
use super::wire;
use crate::retry::Backoff;

/// The kernel's own default; smaller tables only save memory, larger ones avoid growing, each step of
/// which waits for all readers (performance.md 4.6).
const SMALLEST_HASH: usize = 1024;
/// The kernel takes more, but nobody can have more members than this.
const LARGEST_HASH: usize = 1 << 26;

/// What is known about a set in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Kernel {
    /// Nothing: the names have not been listed.
    #[default]
    Unknown,
    Absent,
    /// It is there; with what, is not known.
    Unread,
    Read {
        fit: Fit,
        /// `maxelem`.
        room: u32,
        missing: Tree,
        surplus: Tree,
    },
}

/// Whether a set that is there can become what is wanted by changing members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    Good,
    /// Same type and family, other limits or options: rebuilt beside it and swapped.
    Rebuild,
    /// Other type or family: cannot be swapped, must be destroyed first.
    Replace,
}

/// One set, wanted or not.
#[derive(Debug, Default)]
pub(super) struct Set {
    pub(super) wanted: Option<SetSpec>,
    /// Wanted members that the kernel can hold.
    pub(super) members: Tree,
    /// Wanted members that it cannot hold.
    pub(super) refused: BTreeSet<Member>,
    pub(super) kernel: Kernel,
    pub(super) backoff: Backoff,
    /// Why it is not as wanted; for the operator.
    pub(super) problem: Option<String>,
    /// Since when it is in use although it is not wanted.
    pub(super) busy_since: Option<Instant>,
    /// It was so when it was tried long after.
    pub(super) still_busy: bool,
    /// It was full although there should have been room; once more, and that is so.
    pub(super) doubted: bool,
}

impl Set {
    /// The set is wanted with exactly these members. Returns those that no set can hold.
    pub(super) fn replace(&mut self, spec: SetSpec, members: Members) -> Vec<Member> {
        let refused = self.want_spec(spec.clone());
        let (members, bad) = sift(members, &spec);
        let members = Tree::from(&members);
        if let Kernel::Read { missing, surplus, .. } = &mut self.kernel {
            let mut there = self.members.minus(missing);
            there.insert_all(&surplus.to_list());
            (*missing, *surplus) = (members.minus(&there), there.minus(&members));
        }
        self.members = members;
        let news = bad.difference(&refused).copied().collect();
        self.refused = bad;
        news
    }

    /// Takes the new specification; returns the members refused so far.
    fn want_spec(&mut self, spec: SetSpec) -> BTreeSet<Member> {
        let changed = self.wanted.as_ref().is_some_and(|old| *old != spec);
        if changed && !matches!(self.kernel, Kernel::Unknown | Kernel::Absent) {
            self.kernel = Kernel::Unread;
        }
        self.wanted = Some(spec);
        self.renewed();
        std::mem::take(&mut self.refused)
    }

    /// Members come and go. Returns those that no set can hold, and `None` if the set is not wanted.
    pub(super) fn change(&mut self, added: Members, removed: Members) -> Option<Vec<Member>> {
        let spec = self.wanted.clone()?;
        let (removed, bad) = sift(removed, &spec);
        for member in &bad {
            self.refused.remove(member);
        }
        if !self.refused.is_empty() {
            // The kernel's own refusals.
            for member in removed.iter() {
                self.refused.remove(&member);
            }
        }
        let (leaving, _) = self.members.split(&removed);
        self.members.remove_all(&leaving);
        if let Kernel::Read { missing, surplus, .. } = &mut self.kernel {
            let (never_there, there) = missing.split(&leaving);
            missing.remove_all(&never_there);
            surplus.insert_all(&there);
        }
        let (added, mut news) = sift(added, &spec);
        news.retain(|member| self.refused.insert(*member));
        let (_, coming) = self.members.split(&added);
        self.members.insert_all(&coming);
        if let Kernel::Read { missing, surplus, .. } = &mut self.kernel {
            let (still_there, not_there) = surplus.split(&coming);
            surplus.remove_all(&still_there);
            missing.insert_all(&not_there);
        }
        self.renewed();
        Some(news.into_iter().collect())
    }

    /// The set is no longer wanted. What the kernel has of it is not tracked any further.
    pub(super) fn unwant(&mut self) {
        self.wanted = None;
        self.members.clear();
        self.refused = BTreeSet::new();
        if matches!(self.kernel, Kernel::Read { .. }) {
            self.kernel = Kernel::Unread;
        }
        self.renewed();
    }

    /// A new wish deserves a new attempt at once.
    fn renewed(&mut self) {
        self.backoff.succeeded();
        self.problem = None;
        self.busy_since = None;
        self.still_busy = false;
        self.doubted = false;
    }

    /// True if nothing is to be done or said about the set until somebody changes it.
    pub(super) fn is_at_rest(&self) -> bool {
        let as_wanted = match &self.kernel {
            Kernel::Read { fit: Fit::Good, missing, surplus, .. } => missing.is_empty() && surplus.is_empty(),
            Kernel::Read { .. } | Kernel::Unknown | Kernel::Absent | Kernel::Unread => false,
        };
        self.wanted.is_some() && as_wanted && self.refused.is_empty() && self.backoff.due().is_none()
    }

    /// Takes what was read; returns true if it differs from what was known before.
    pub(super) fn read(&mut self, contents: Option<Contents>, limit: u32) -> bool {
        let Some(contents) = contents else {
            let news = !matches!(self.kernel, Kernel::Unknown | Kernel::Absent);
            self.kernel = Kernel::Absent;
            return news;
        };
        let Some(spec) = &self.wanted else {
            self.kernel = Kernel::Unread;
            return false;
        };
        let fit = fit(spec, &contents.type_name, contents.family, contents.max_members, contents.odd, limit);
        let room = contents.max_members.unwrap_or(0);
        let (missing, surplus) = if fit == Fit::Good {
            let there: Tree = contents.members.into_iter().collect();
            // An incomplete reading may only add; what it did not show is added again, which is harmless (I3).
            let surplus = if contents.complete { there.minus(&self.members) } else { Tree::default() };
            (self.members.minus(&there), surplus)
        } else {
            (self.members.clone(), Tree::default())
        };
        let new = Kernel::Read { fit, room, missing, surplus };
        let news = self.kernel != new;
        self.kernel = new;
        news
    }

    /// Whether a header says nothing against what is believed; a set with as many members as expected may still
    /// have others.
    pub(super) fn agrees(&self, header: &Header, limit: u32) -> bool {
        let (Some(spec), Kernel::Read { fit: believed, room, missing, surplus }) = (&self.wanted, &self.kernel) else {
            return true;
        };
        let fit = fit(spec, &header.type_name, header.family, header.max_members, header.special, limit);
        let expected = (self.members.len() + surplus.len()).saturating_sub(missing.len());
        let count = header.members.is_none_or(|count| count as usize == expected);
        // Members of a set that is to be rebuilt are not tracked.
        fit == *believed && (fit != Fit::Good || (count && header.max_members == Some(*room)))
    }

    /// Counts the wanted members in a part of the set that was read beside the work, as far as they are believed to
    /// be there. `None` if there is one that should not be. Nothing is said about members in `touched`, which were
    /// written meanwhile.
    pub(super) fn count(&self, part: &[Member], touched: &Tree) -> Option<usize> {
        let Kernel::Read { missing, surplus, .. } = &self.kernel else {
            return Some(0);
        };
        let mut count = 0;
        for member in part.iter().filter(|member| touched.is_empty() || !touched.contains(member)) {
            if self.members.contains(member) {
                count += usize::from(!missing.contains(member));
            } else if !surplus.contains(member) {
                return None;
            }
        }
        Some(count)
    }

    /// Whether `count` members, told by [`Self::count`] of the parts of a reading, are all that should be there. One
    /// that was written meanwhile may have been counted before.
    pub(super) fn is_all(&self, count: usize, touched: &Tree) -> bool {
        let Kernel::Read { missing, .. } = &self.kernel else {
            return true;
        };
        let there = |member: &Member| self.members.contains(member) && !missing.contains(member);
        let written = missing.len() + touched.iter().filter(there).count();
        let least = self.members.len().saturating_sub(written);
        (least..=least + touched.len()).contains(&count)
    }

    /// Whether what a reading says of the set itself is as believed.
    pub(super) fn fits(&self, contents: &Contents, limit: u32) -> bool {
        let (Some(spec), Kernel::Read { fit: believed, .. }) = (&self.wanted, &self.kernel) else {
            return true;
        };
        let found = fit(spec, &contents.type_name, contents.family, contents.max_members, contents.odd, limit);
        found == *believed
    }

    /// The size to create the set with: as configured, or the next power of two that holds its members. A quarter
    /// is left for new members that come before old ones go, unless that is more than `limit`. `None` if the
    /// members themselves are more than that.
    pub(super) fn size(&self, limit: u32) -> Option<u32> {
        let spec = self.wanted.as_ref()?;
        let (count, limit) = (u32::try_from(self.members.len()).ok()?, limit.max(spec.max_members));
        let sizes = [count.saturating_add(count / 4), count].map(|count| match count {
            count if count <= spec.max_members => spec.max_members,
            count => count.checked_next_power_of_two().unwrap_or(u32::MAX),
        });
        let fitting = sizes.into_iter().find(|size| *size <= limit);
        fitting.or_else(|| (count <= limit).then_some(limit))
    }

    /// Plans what creates the set, adds its missing members or rebuilds it through the set `temporary`. With
    /// `may_lose` there are no rules to wait for before members are taken out, so that these may make room.
    pub(super) fn additions(
        &self,
        name: &SetName,
        limit: u32,
        may_lose: bool,
        temporary: impl FnOnce() -> Option<SetName>,
    ) -> Vec<Op> {
        let (Some(spec), Some(size)) = (&self.wanted, self.size(limit)) else {
            return Vec::new();
        };
        match &self.kernel {
            Kernel::Unknown | Kernel::Unread => Vec::new(),
            Kernel::Absent => build(name, spec, size, &self.members),
            Kernel::Read { fit: Fit::Replace, .. } => {
                let mut ops = vec![Op::Destroy { set: name.clone() }];
                ops.extend(build(name, spec, size, &self.members));
                ops
            }
            Kernel::Read { fit: Fit::Good, missing, .. } if missing.is_empty() => Vec::new(),
            // The new members fit in beside those that are taken out only later.
            Kernel::Read { fit: Fit::Good, room, missing, surplus }
                if self.members.len() + surplus.len() <= *room as usize =>
            {
                vec![Op::Add { set: name.clone(), members: missing.to_list() }]
            }
            Kernel::Read { fit: Fit::Good, room, missing, surplus }
                if may_lose
                    && self.members.len() <= *room as usize
                    && missing.len() + surplus.len() <= self.members.len() / 2 =>
            {
                vec![
                    Op::Remove { set: name.clone(), members: surplus.to_list() },
                    Op::Add { set: name.clone(), members: missing.to_list() },
                ]
            }
            Kernel::Read { fit: Fit::Good | Fit::Rebuild, .. } => match temporary() {
                Some(temporary) => {
                    let mut ops = build(&temporary, spec, size, &self.members);
                    ops.push(Op::Swap { set: name.clone(), with: temporary });
                    ops
                }
                None => Vec::new(),
            },
        }
    }

    /// Plans what takes surplus members out.
    pub(super) fn removals(&self, name: &SetName) -> Option<Op> {
        match &self.kernel {
            Kernel::Read { fit: Fit::Good, surplus, .. } if self.wanted.is_some() && !surplus.is_empty() => {
                Some(Op::Remove { set: name.clone(), members: surplus.to_list() })
            }
            Kernel::Read { .. } | Kernel::Unknown | Kernel::Absent | Kernel::Unread => None,
        }
    }

    /// True if the kernel has what is wanted; surplus members may still be there.
    pub(super) fn is_filled(&self) -> bool {
        let filled = match &self.kernel {
            Kernel::Read { fit: Fit::Good, missing, .. } => missing.is_empty(),
            Kernel::Read { .. } | Kernel::Unknown | Kernel::Absent | Kernel::Unread => false,
        };
        filled && self.refused.is_empty()
    }

    /// The set was created, empty, with this size.
    pub(super) fn created(&mut self, room: u32) {
        self.kernel = Kernel::Read { fit: Fit::Good, room, missing: self.members.clone(), surplus: Tree::default() };
    }

    /// The set was exchanged for one of this size with all wanted members.
    pub(super) fn exchanged(&mut self, room: u32) {
        let (missing, surplus) = (Tree::default(), Tree::default());
        self.kernel = Kernel::Read { fit: Fit::Good, room, missing, surplus };
    }

    /// Nothing of what it has can be kept, whatever that is.
    pub(super) fn must_be(&mut self, fit: Fit) {
        let surplus = Tree::default();
        self.kernel = Kernel::Read { fit, room: 0, missing: self.members.clone(), surplus };
    }

    /// These members were added to the set itself.
    pub(super) fn added(&mut self, members: &Members) {
        if let Kernel::Read { missing, .. } = &mut self.kernel {
            missing.remove_all(members);
        }
    }

    /// These members were taken out.
    pub(super) fn removed(&mut self, members: &Members) {
        if let Kernel::Read { surplus, .. } = &mut self.kernel {
            surplus.remove_all(members);
        }
    }

    /// The kernel refused this member for good.
    pub(super) fn refuse(&mut self, member: Member) {
        self.members.remove(&member);
        if let Kernel::Read { missing, .. } = &mut self.kernel {
            missing.remove(&member);
        }
        self.refused.insert(member);
    }
}

/// A set may have grown beyond its configured size, even in an earlier life of this program.
fn fit(spec: &SetSpec, type_name: &str, family: Option<Family>, room: Option<u32>, odd: bool, limit: u32) -> Fit {
    if type_name != wire::type_name(spec.kind) || family != Some(spec.family) {
        return Fit::Replace;
    }
    let sizes = spec.max_members..=limit.max(spec.max_members);
    if odd || !room.is_some_and(|room| sizes.contains(&room)) { Fit::Rebuild } else { Fit::Good }
}

/// Creates a set and fills it.
fn build(name: &SetName, spec: &SetSpec, size: u32, members: &Tree) -> Vec<Op> {
    let mut ops = vec![Op::Create {
        name: name.clone(),
        kind: spec.kind,
        family: spec.family,
        max_members: size,
        hash_size: hash_size(members.len()),
    }];
    if !members.is_empty() {
        ops.push(Op::Add { set: name.clone(), members: members.to_list() });
    }
    ops
}

fn hash_size(members: usize) -> u32 {
    let size = members.clamp(SMALLEST_HASH, LARGEST_HASH).next_power_of_two();
    u32::try_from(size).unwrap_or(1 << 26)
}

/// Returns the members that the set can hold, in the form in which the kernel reports them, and those that it cannot.
fn sift(members: Members, spec: &SetSpec) -> (Members, BTreeSet<Member>) {
    let is_good = |member: Member| acceptable(&member, spec.kind) && normalise(member, spec) == Some(member);
    // As the compiler makes them.
    if members.iter().all(is_good) {
        return (members, BTreeSet::new());
    }
    let normal = members.iter().filter_map(|member| normalise(member, spec));
    let (good, bad): (Vec<Member>, Vec<Member>) = normal.partition(|member| acceptable(member, spec.kind));
    (good.into(), bad.into_iter().collect())
}

/// Brings a member into the form in which the kernel reports it. `None` for a member of the other
/// family, which is left out silently, because both families are offered the same (netfilter.md 17.1).
fn normalise(member: Member, spec: &SetSpec) -> Option<Member> {
    if member.family() != spec.family {
        return None;
    }
    Some(match (spec.kind, member) {
        (SetKind::Net, Member::Address(address)) => Member::Net(IpNet::from(address)),
        (SetKind::Net, Member::Net(net)) => Member::Net(net.trunc()),
        (SetKind::Address, Member::Net(net)) if net.prefix_len() == net.max_prefix_len() => Member::Address(net.addr()),
        (SetKind::Address | SetKind::AddressPort, member @ (Member::Address(_) | Member::Net(_)))
        | (SetKind::Address | SetKind::Net | SetKind::AddressPort, member @ Member::AddressPort { .. }) => member,
    })
}

/// The kernel cannot hold networks of length 0 (crates.md I5), nor members of another type's form.
fn acceptable(member: &Member, kind: SetKind) -> bool {
    match (kind, member) {
        (SetKind::Address, Member::Address(_)) | (SetKind::AddressPort, Member::AddressPort { .. }) => true,
        (SetKind::Net, Member::Net(net)) => net.prefix_len() > 0,
        (SetKind::Address, Member::Net(_) | Member::AddressPort { .. })
        | (SetKind::Net, Member::Address(_) | Member::AddressPort { .. })
        | (SetKind::AddressPort, Member::Address(_) | Member::Net(_)) => false,
    }
}

/// True for names of sets of either family that this program or its predecessors made.
pub(super) fn is_of_this_program(name: &str) -> bool {
    Family::BOTH.into_iter().any(|family| is_ours(name, family))
}

/// True for names of sets that this program or its predecessors made (netfilter.md 17.4).
pub(super) fn is_ours(name: &str, family: Family) -> bool {
    let prefixes: &[&str] = match family {
        Family::V4 => &["cali4", "felix-4", "felix-masq-ipam-pools", "felix-all-ipam-pools"],
        Family::V6 => &["cali6", "felix-6"],
    };
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// The name of the `n`-th temporary set.
pub(super) fn temporary_name(family: Family, n: u32) -> Option<SetName> {
    SetName::new(&format!("cali{}t{n}", family.digit()))
}
