//! Dispatch chains: from an interface name to the chains of its endpoint (netfilter.md 7).
//!
//! Fed with the names of the interfaces that have endpoints, feeds the table programs of
//! [`crate::uses`].
//!
//! Invariants: every interface is found by its exact name; a packet of a workload interface without an
//! endpoint meets a deny, in both directions.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Included, Unbounded};

use model::Name;
use program::{Action, Chain, ChainName, InterfaceMatch, Match, Rule, Table};

use crate::names;
use crate::options::Options;

/// Which interface of a packet decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    From,
    To,
}

impl Way {
    fn interface(self, interface: InterfaceMatch) -> Match {
        match self {
            Self::From => Match::In(interface),
            Self::To => Match::Out(interface),
        }
    }
}

/// A dispatch tree of one level (7.1).
#[derive(Clone, Debug)]
pub struct Tree<'a> {
    pub root: &'a str,
    pub way: Way,
    /// Prefix of the chains that names lead to.
    pub target: &'a str,
    /// Rules that end the root and, because a goto does not come back, every child.
    pub end: Vec<Rule>,
    /// Between root and last character of the name of a child.
    pub infix: &'a str,
}

/// The names that lead to one child, or the one name that the root finds itself.
#[derive(Clone, Debug)]
struct Bin<'a> {
    /// What the names have in common.
    prefix: &'a str,
    /// The last character of `prefix`, in which the bins differ.
    extra: &'a str,
    names: Vec<&'a str>,
}

impl<'a> Bin<'a> {
    /// `common` is the length of the longest common prefix of the names of the tree.
    fn of(common: usize, names: Vec<&'a str>) -> Option<Self> {
        let first: &'a str = names.first()?;
        let end = end_of_bin(first, common);
        Some(Self { prefix: first.get(..end)?, extra: first.get(common..end)?, names })
    }
}

/// Names are ASCII (`names::interface_defect`), so that one byte more is one character more.
fn end_of_bin(name: &str, common: usize) -> usize {
    name.len().min(common + 1)
}

impl Tree<'_> {
    /// Returns the child chains and, last, the root. `names` are sorted, each once.
    pub fn chains(&self, names: &[&str]) -> Vec<Chain> {
        let common = common_prefix(names.first(), names.last());
        let bins = names.chunk_by(|a, b| a.get(..end_of_bin(a, common)) == b.get(..end_of_bin(b, common)));
        let bins: Vec<Bin<'_>> = bins.filter_map(|bin| Bin::of(common, bin.to_vec())).collect();
        let mut chains: Vec<Chain> = bins.iter().filter_map(|bin| self.child(bin)).collect();
        let rules = bins.iter().map(|bin| match bin.names[..] {
            [name] => self.root_rule(bin.prefix, bin.extra, Some(name)),
            _ => self.root_rule(bin.prefix, bin.extra, None),
        });
        let rules = rules.chain(self.end.iter().cloned()).collect();
        chains.push(Chain { name: ChainName::fixed(self.root), rules });
        chains
    }

    /// The root's rule for one bin: to the only name of it, if there is one, or to the child.
    fn root_rule(&self, prefix: &str, extra: &str, only: Option<&str>) -> Rule {
        only.map_or_else(
            || {
                let matches = vec![self.way.interface(InterfaceMatch::Prefix(prefix.to_owned()))];
                Rule::new(matches, Action::Goto(self.child_name(extra)))
            },
            |name| self.leaf(name),
        )
    }

    fn child_name(&self, extra: &str) -> ChainName {
        names::chain(&format!("{}{}-", self.root, self.infix), extra)
    }

    /// The chain of a bin, if it has more than one name.
    fn child(&self, bin: &Bin<'_>) -> Option<Chain> {
        let leaves = bin.names.iter().map(|name| self.leaf(name));
        let rules = || leaves.chain(self.end.iter().cloned()).collect();
        (bin.names.len() > 1).then(|| Chain { name: self.child_name(bin.extra), rules: rules() })
    }

    fn leaf(&self, name: &str) -> Rule {
        let matches = vec![self.way.interface(InterfaceMatch::Exact(name.to_owned()))];
        Rule::new(matches, Action::Goto(names::chain(self.target, name)))
    }
}

/// Length in bytes of the longest common prefix of sorted names, given the first and the last of them.
fn common_prefix<T: AsRef<str>>(first: Option<T>, last: Option<T>) -> usize {
    // Of sorted names the first and the last differ the earliest.
    let (Some(first), Some(last)) = (first, last) else { return 0 };
    first.as_ref().bytes().zip(last.as_ref().bytes()).take_while(|(a, b)| a == b).count()
}

fn workload_trees(options: &Options) -> [Tree<'static>; 2] {
    let tree = |root, way, target| {
        let unknown = Rule::new(Vec::new(), options.deny(Table::Filter)).comment("Unknown interface");
        Tree { root, way, target, end: vec![unknown], infix: "" }
    };
    [
        tree(names::FROM_WORKLOAD_DISPATCH, Way::From, names::FROM_WORKLOAD),
        tree(names::TO_WORKLOAD_DISPATCH, Way::To, names::TO_WORKLOAD),
    ]
}

/// Returns the dispatch chains of workloads (7.2). `names` are sorted, each once.
pub fn workloads(options: &Options, names: &[&str]) -> Vec<Chain> {
    workload_trees(options).iter().flat_map(|tree| tree.chains(names)).collect()
}

/// Finds out which dispatch chains of workloads differ when interfaces come and go.
///
/// Law: what [`changes`](Self::changes) returned so far adds up to [`workloads`] of the present names.
/// Cost: of an interface, the names that share a chain with it; the names of all only when their common
/// prefix changes.
#[derive(Debug, Default)]
pub struct WorkloadDispatch {
    /// Of the names of the last call; `None` before the first.
    common: Option<usize>,
    /// Children that were defined.
    children: BTreeSet<ChainName>,
}

/// Chains to define, and children to undefine.
pub type DispatchChanges = (Vec<Chain>, Vec<ChainName>);

impl WorkloadDispatch {
    /// `names` are all of them now, `touched` those that came or went since the last call.
    pub fn changes<'a, T>(
        &mut self,
        options: &Options,
        names: &BTreeMap<Name, T>,
        touched: impl Iterator<Item = &'a Name>,
    ) -> DispatchChanges {
        let common = common_prefix(names.keys().next(), names.keys().next_back());
        if self.common.replace(common) != Some(common) {
            let names: Vec<&str> = names.keys().map(AsRef::as_ref).collect();
            let chains = workloads(options, &names);
            let roots = [names::FROM_WORKLOAD_DISPATCH, names::TO_WORKLOAD_DISPATCH];
            let children = chains.iter().map(|chain| &chain.name).filter(|name| !roots.contains(&name.as_str()));
            let old = std::mem::replace(&mut self.children, children.cloned().collect());
            let gone = old.difference(&self.children).cloned().collect();
            return (chains, gone);
        }
        let touched: BTreeSet<&str> = touched.filter_map(|name| name.get(..end_of_bin(name, common))).collect();
        let (mut chains, mut gone) = (Vec::new(), Vec::new());
        for tree in workload_trees(options) {
            for prefix in &touched {
                let child = Bin::of(common, bin_names(names, prefix, common)).and_then(|bin| tree.child(&bin));
                match child {
                    Some(child) => {
                        self.children.insert(child.name.clone());
                        chains.push(child);
                    }
                    None => gone.extend(self.children.take(&tree.child_name(prefix.get(common..).unwrap_or_default()))),
                }
            }
            let mut rules = Vec::new();
            let mut next = names.keys().next();
            while let Some(first) = next {
                let end = end_of_bin(first, common);
                let prefix = first.get(..end).unwrap_or_default();
                let second = names.range::<str, _>((Excluded(&**first), Unbounded)).map(|(name, _)| name).next();
                let is_alone = end == common || second.is_none_or(|second| !second.starts_with(prefix));
                let extra = first.get(common..end).unwrap_or_default();
                rules.push(tree.root_rule(prefix, extra, is_alone.then_some(first)));
                next = if is_alone { second } else { first_behind(names, prefix) };
            }
            rules.append(&mut tree.end.clone());
            chains.push(Chain { name: ChainName::fixed(tree.root), rules });
        }
        (chains, gone)
    }
}

/// The names of a bin, given what they have in common.
fn bin_names<'a, T>(names: &'a BTreeMap<Name, T>, prefix: &str, common: usize) -> Vec<&'a str> {
    let from = names.range::<str, _>((Included(prefix), Unbounded)).map(|(name, _)| &**name);
    // The name that is the common prefix itself has a bin of its own.
    let is_in = |name: &&str| if prefix.len() == common { *name == prefix } else { name.starts_with(prefix) };
    from.take_while(is_in).collect()
}

/// The first name behind all that begin with a prefix.
fn first_behind<'a, T>(names: &'a BTreeMap<Name, T>, prefix: &str) -> Option<&'a Name> {
    let mut behind = prefix.to_owned();
    let last = behind.pop()?;
    behind.push(char::from_u32(u32::from(last) + 1)?);
    names.range::<str, _>((Included(&*behind), Unbounded)).map(|(name, _)| name).next()
}

/// One dispatch chain of host endpoints (7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostDispatch {
    From,
    To,
    FromForward,
    ToForward,
}

/// Returns a dispatch chain of host endpoints with its children. `names` are sorted, each once;
/// `wildcard`: an endpoint takes all other interfaces.
pub fn hosts(options: &Options, table: Table, which: HostDispatch, names: &[&str], wildcard: bool) -> Vec<Chain> {
    let (root, way, target) = match which {
        HostDispatch::From => (names::FROM_HOST_ENDPOINT, Way::From, names::FROM_HOST),
        HostDispatch::To => (names::TO_HOST_ENDPOINT, Way::To, names::TO_HOST),
        HostDispatch::FromForward => (names::FROM_HOST_FORWARD, Way::From, names::FROM_HOST_FW),
        HostDispatch::ToForward => (names::TO_HOST_FORWARD, Way::To, names::TO_HOST_FW),
    };
    let mut end = Vec::new();
    if wildcard {
        if table == Table::Mangle && which == HostDispatch::To {
            // In the filter table workload interfaces have left before.
            end.extend(options.interface_prefixes.iter().map(|prefix| {
                let matches = vec![way.interface(InterfaceMatch::Prefix(prefix.clone()))];
                Rule::new(matches, Action::Return).comment("Skip egress WHEP policy for traffic to local workload")
            }));
        }
        end.push(Rule::new(Vec::new(), Action::Goto(names::chain(target, names::ANY_INTERFACE))));
    }
    Tree { root, way, target, end, infix: "" }.chains(names)
}

/// Returns the chains that give packets the mark of the endpoint they came from, and find the endpoint of
/// a mark (7.4, IPVS only). Names are sorted, each once; `mark_of` is the mark of an interface.
pub fn endpoint_marks(
    options: &Options,
    workloads: &[&str],
    hosts: &[&str],
    mark_of: &dyn Fn(&str) -> Option<u32>,
) -> Vec<Chain> {
    let mask = options.marks.endpoint;
    let tree = |infix, names: &[&str]| {
        let root = names::SET_ENDPOINT_MARK;
        let tree = Tree { root, way: Way::From, target: names::SET_MARK, end: Vec::new(), infix };
        let mut chains = tree.chains(names);
        let rules = chains.pop().map(|root| root.rules).unwrap_or_default();
        (chains, rules)
    };
    let (mut chains, mut set) = tree("-wep", workloads);
    let (host_chains, host_rules) = tree("-hep", hosts);
    chains.extend(host_chains);
    set.extend(host_rules);
    for prefix in &options.interface_prefixes {
        let matches = vec![Match::In(InterfaceMatch::Prefix(prefix.clone()))];
        set.push(Rule::new(matches, options.deny(Table::Filter)).comment("Unknown endpoint"));
    }
    let other = Action::SetMaskedMark { value: options.marks.non_cali, mask };
    set.push(Rule::new(Vec::new(), other).comment("Non-Cali endpoint mark"));
    chains.push(Chain { name: ChainName::fixed(names::SET_ENDPOINT_MARK), rules: set });

    let find = |target: &'static str| {
        move |name: &&str| {
            let value = mark_of(name)?;
            let matches = vec![Match::MarkIs { value, mask }];
            Some(Rule::new(matches, Action::Goto(names::chain(target, name))))
        }
    };
    let mut from: Vec<Rule> = workloads.iter().filter_map(find(names::FROM_WORKLOAD)).collect();
    from.extend(hosts.iter().filter_map(find(names::FROM_HOST_FW)));
    from.push(Rule::new(Vec::new(), options.deny(Table::Filter)).comment("Unknown interface"));
    chains.push(Chain { name: ChainName::fixed(names::FROM_ENDPOINT_MARK), rules: from });
    chains
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_name() -> impl Strategy<Value = Name> {
        let names = "(cali|tap)?[ab0-]{0,3}";
        let common = prop::sample::select(vec!["cali", "cali1", "cali1a", "caliz", "tap", "c"]).prop_map(str::to_owned);
        prop_oneof![8 => names.prop_map(|name| format!("cali{name}")), 1 => names, 1 => common].prop_map(Name::from)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1_000) })]
        #[test]
        fn changes_add_up_to_the_dispatch_of_all_names(
            steps in prop::collection::vec(prop::collection::btree_set(any_name(), 0..4), 0..20),
        ) {
            let options = Options::default();
            let (mut dispatch, mut names) = (WorkloadDispatch::default(), BTreeMap::new());
            let mut present: BTreeMap<ChainName, Chain> = BTreeMap::new();
            for touched in steps {
                for name in &touched {
                    if names.remove(name).is_none() {
                        names.insert(Name::clone(name), ());
                    }
                }
                let (chains, gone) = dispatch.changes(&options, &names, touched.iter());
                for name in gone {
                    prop_assert!(present.remove(&name).is_some(), "{name} was not there");
                }
                present.extend(chains.into_iter().map(|chain| (chain.name.clone(), chain)));
                let all: Vec<&str> = names.keys().map(AsRef::as_ref).collect();
                let expected: BTreeMap<ChainName, Chain> =
                    workloads(&options, &all).into_iter().map(|chain| (chain.name.clone(), chain)).collect();
                prop_assert_eq!(&present, &expected, "{:?}", all);
            }
        }
    }

    #[test]
    fn an_interface_touches_the_chains_on_its_path_only() {
        let (options, mut dispatch) = (Options::default(), WorkloadDispatch::default());
        let mut names: BTreeMap<Name, ()> =
            ["calia1", "calia2", "calib1", "calic1", "calic2"].into_iter().map(|name| (name.into(), ())).collect();
        let all: Vec<Name> = names.keys().cloned().collect();
        assert_eq!(dispatch.changes(&options, &names, all.iter()).0.len(), 2 + 4);
        let mut told = |names: &BTreeMap<Name, ()>, name: &str| {
            let (chains, gone) = dispatch.changes(&options, names, [Name::from(name)].iter());
            let mut told: Vec<String> = chains.iter().map(|chain| chain.name.to_string()).collect();
            told.extend(gone.iter().map(|name| format!("-{name}")));
            told.sort();
            told.join(" ").replace("cali-from-wl-dispatch", "F").replace("cali-to-wl-dispatch", "T")
        };
        names.insert("calia3".into(), ());
        assert_eq!(told(&names, "calia3"), "F F-a T T-a");
        names.insert("calid1".into(), ());
        assert_eq!(told(&names, "calid1"), "F T");
        names.remove("calic2");
        assert_eq!(told(&names, "calic2"), "-F-c -T-c F T");
    }
}
