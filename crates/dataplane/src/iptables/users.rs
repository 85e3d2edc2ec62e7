//! Who uses a set: rules of this program by their origin, rules of anybody by a listing.
//!
//! Asked by the apply loop for the operator: about a set that became too large, and about one that cannot be
//! destroyed for long, usually because of what another variant or program has left (users.md U3.b, U3.c).

use std::collections::{BTreeMap, BTreeSet};

use program::{Origin, Rule, SetName};

use super::backend::families;
use super::hold::direction_word;
use super::table::TableDriver;
use super::variant;
use crate::options::{Options, Variant};

/// More rules than this are only counted.
const MOST_RULES: usize = 5;

impl TableDriver {
    /// The policies and profiles of which a rule names the set, with the first such rule of each direction, which is where
    /// the selector of the set is found; chains that come from none, by name.
    pub fn owners(&self, set: &SetName) -> BTreeSet<String> {
        let mut first: BTreeMap<String, Option<u32>> = BTreeMap::new();
        for (chain, wanted) in &self.chains {
            for rule in wanted.chain.rules.iter().filter(|rule| rule.sets().any(|named| named == set)) {
                let (owner, index) = owner(chain, rule);
                let known = first.entry(owner).or_insert(index);
                *known = index.min(*known);
            }
        }
        let text = |(owner, index): (String, Option<u32>)| match index {
            Some(index) => format!("{owner} rule {index}"),
            None => owner,
        };
        first.into_iter().map(text).collect()
    }
}

/// Where a rule comes from, and its place there.
fn owner(chain: &str, rule: &Rule) -> (String, Option<u32>) {
    match &rule.origin {
        Some(Origin::Policy { key, direction, index }) => {
            (format!("policy {key} {}", direction_word(*direction)), Some(*index))
        }
        Some(Origin::Profile { name, direction, index }) => {
            (format!("profile {name} {}", direction_word(*direction)), Some(*index))
        }
        None => (format!("chain {chain}"), None),
    }
}

/// The rules of both variants and all families in use that name a set, in words for the operator.
pub(super) async fn rules_naming(set: &SetName, options: &Options) -> Vec<String> {
    let directories = variant::search_path();
    let mut rules = Vec::new();
    for family in families(options) {
        for of in [Variant::Legacy, Variant::Nft] {
            let listing = variant::listing(family, of, &directories, options.program_timeout).await;
            rules.extend(
                in_listing(&listing, set.as_str())
                    .map(|(table, rule)| format!("rule `{rule}` of table {table} ({family}, {})", of.as_str())),
            );
        }
    }
    if let Some(more) = rules.len().checked_sub(MOST_RULES).filter(|more| *more > 0) {
        rules.truncate(MOST_RULES);
        rules.push(format!("{more} rules more"));
    }
    rules
}

/// The rules of a listing that name a set, with their tables.
fn in_listing<'a>(listing: &'a str, set: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    const OPTIONS: [&str; 3] = ["--match-set", "--add-set", "--del-set"];
    let mut table = "";
    listing.lines().filter_map(move |line| {
        table = line.strip_prefix('*').unwrap_or(table);
        let mut words = line.split(' ').map(|word| word.trim_matches('"'));
        let mut names = false;
        while let Some(word) = words.next() {
            names |= OPTIONS.contains(&word) && words.next() == Some(set);
        }
        (names && line.starts_with("-A ")).then_some((table, line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_name_a_set_are_found_with_their_tables() {
        let listing = "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -m set --match-set cali40s:ab src -j ACCEPT\n\
            -A PREROUTING -m set --match-set cali40s:abc src -j ACCEPT\n\
            -A PREROUTING -m comment --comment \"--match-set x\" -j ACCEPT\nCOMMIT\n\
            *filter\n-A INPUT -m set ! --match-set cali40s:ab dst,src --return-nomatch -j DROP\n\
            -A INPUT -j SET --add-set cali40s:ab src\n-A INPUT -j SET --del-set cali40s:a src\nCOMMIT\n";
        let found: Vec<_> = in_listing(listing, "cali40s:ab").map(|(table, rule)| (table, &rule[..8])).collect();
        assert_eq!(found, [("nat", "-A PRERO"), ("filter", "-A INPUT"), ("filter", "-A INPUT")]);
        assert_eq!(in_listing(listing, "cali40s").count(), 0);
        assert_eq!(in_listing("", "x").count(), 0);
    }
}
