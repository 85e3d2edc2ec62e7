//! Dispatch chains: from an interface name to the chains of its endpoint (netfilter.md 7).
//!
//! Fed with the names of the interfaces that have endpoints, feeds the table programs of
//! [`crate::uses`].
//!
//! Invariants: every interface is found by its exact name; a packet of a workload interface without an
//! endpoint meets a deny, in both directions.

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

impl Tree<'_> {
    /// Returns the child chains and, last, the root. `names` are sorted, each once.
    pub fn chains(&self, names: &[&str]) -> Vec<Chain> {
        let common = common_prefix(names);
        // Names are ASCII (`names::interface_defect`), so that one byte more is one character more.
        let bin_of = |name: &str| name.len().min(common + 1);
        let mut chains = Vec::new();
        let mut root = Vec::new();
        for bin in names.chunk_by(|a, b| a.get(..bin_of(a)) == b.get(..bin_of(b))) {
            match bin {
                [name] => root.push(self.leaf(name)),
                [first, ..] => {
                    let prefix = first.get(..bin_of(first)).unwrap_or(first);
                    let extra = first.get(common..bin_of(first)).unwrap_or_default();
                    let child = names::chain(&format!("{}{}-", self.root, self.infix), extra);
                    let matches = vec![self.way.interface(InterfaceMatch::Prefix(prefix.to_owned()))];
                    root.push(Rule::new(matches, Action::Goto(child.clone())));
                    let rules = bin.iter().map(|name| self.leaf(name)).chain(self.end.iter().cloned()).collect();
                    chains.push(Chain { name: child, rules });
                }
                [] => {}
            }
        }
        root.extend(self.end.iter().cloned());
        chains.push(Chain { name: ChainName::fixed(self.root), rules: root });
        chains
    }

    fn leaf(&self, name: &str) -> Rule {
        let matches = vec![self.way.interface(InterfaceMatch::Exact(name.to_owned()))];
        Rule::new(matches, Action::Goto(names::chain(self.target, name)))
    }
}

/// Length of the longest common prefix in bytes.
fn common_prefix(names: &[&str]) -> usize {
    // Of sorted names the first and the last differ the earliest.
    let (Some(first), Some(last)) = (names.first(), names.last()) else { return 0 };
    first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count()
}

/// Returns the dispatch chains of workloads (7.2). `names` are sorted, each once.
pub fn workloads(options: &Options, names: &[&str]) -> Vec<Chain> {
    let unknown = || vec![Rule::new(Vec::new(), options.deny(Table::Filter)).comment("Unknown interface")];
    let from = Tree {
        root: names::FROM_WORKLOAD_DISPATCH,
        way: Way::From,
        target: names::FROM_WORKLOAD,
        end: unknown(),
        infix: "",
    };
    let to =
        Tree { root: names::TO_WORKLOAD_DISPATCH, way: Way::To, target: names::TO_WORKLOAD, end: unknown(), infix: "" };
    let mut chains = from.chains(names);
    chains.extend(to.chains(names));
    chains
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
