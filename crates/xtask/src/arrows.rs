//! Checks the arrows between crates against one table.
//!
//! The table is complete in both directions: a workspace member that it does not name, a name that
//! no member has, and a forbidden crate that is misspelt all fail, because a misspelt name would
//! otherwise "not be found" and pass.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// What one member may use of ours, and which outside crates must not be reachable from it.
struct Row {
    name: &'static str,
    may_use: &'static [&'static str],
    must_not_reach: &'static [&'static str],
}

/// Crates through which a program touches the world; the pure core reaches none of them.
const WORLD: &[&str] =
    &["tokio", "etcd-client", "rtnetlink", "netlink-sys", "nix", "axum", "tracing-subscriber", "fastrand"];

/// The drawing of ARCHITECTURE.md as a table: normal dependencies only, `testkit` is one of nobody.
const TABLE: &[Row] = &[
    Row { name: "model", may_use: &[], must_not_reach: WORLD },
    Row { name: "settings", may_use: &["model"], must_not_reach: WORLD },
    Row { name: "program", may_use: &["model"], must_not_reach: WORLD },
    Row { name: "graph", may_use: &["model"], must_not_reach: WORLD },
    Row { name: "compiler", may_use: &["model", "graph", "program"], must_not_reach: WORLD },
    Row { name: "verdict", may_use: &["model"], must_not_reach: WORLD },
    Row { name: "datastore", may_use: &["model"], must_not_reach: &["rtnetlink", "netlink-sys"] },
    Row { name: "tableinfo", may_use: &[], must_not_reach: &["tokio", "etcd-client", "rtnetlink"] },
    Row { name: "dataplane", may_use: &["model", "program", "tableinfo"], must_not_reach: &["etcd-client"] },
    Row { name: "telemetry", may_use: &[], must_not_reach: &["etcd-client", "rtnetlink"] },
    Row {
        name: "agent",
        may_use: &["model", "settings", "datastore", "graph", "program", "compiler", "dataplane", "telemetry"],
        must_not_reach: &["iptables"],
    },
    Row { name: "testkit", may_use: &["model", "graph", "program", "dataplane", "verdict"], must_not_reach: &[] },
    Row { name: "xtask", may_use: &[], must_not_reach: &["tokio"] },
    Row { name: "felix-tests", may_use: ANYTHING, must_not_reach: &[] },
    Row { name: "felix-benches", may_use: ANYTHING, must_not_reach: &[] },
];

const ANYTHING: &[&str] = &[
    "model",
    "settings",
    "datastore",
    "graph",
    "program",
    "compiler",
    "verdict",
    "dataplane",
    "tableinfo",
    "telemetry",
    "agent",
    "testkit",
];

/// Not in any tree of ours, whatever the row: licence or a second TLS stack (deny.toml has the reasons).
const NOBODY: &[&str] = &["ipset", "rustables", "nftnl", "openssl-sys", "aws-lc-rs"];

/// Returns one line per violation.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("running `cargo metadata`")?;
    if !output.status.success() {
        bail!("`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata = serde_json::from_slice(&output.stdout).context("parsing `cargo metadata`")?;
    Ok(violations(&Tree::read(&metadata).context("unexpected shape of `cargo metadata`")?, TABLE, NOBODY))
}

/// The resolved dependency tree: package names, and normal dependencies by package id.
#[derive(Debug, Default)]
struct Tree {
    names: BTreeMap<String, String>,
    members: BTreeSet<String>,
    normal: BTreeMap<String, BTreeSet<String>>,
}

impl Tree {
    fn read(metadata: &Value) -> Option<Self> {
        let mut tree = Self::default();
        for package in metadata.get("packages")?.as_array()? {
            tree.names.insert(package.get("id")?.as_str()?.to_owned(), package.get("name")?.as_str()?.to_owned());
        }
        for member in metadata.get("workspace_members")?.as_array()? {
            tree.members.insert(member.as_str()?.to_owned());
        }
        for node in metadata.get("resolve")?.get("nodes")?.as_array()? {
            let dependencies = tree.normal.entry(node.get("id")?.as_str()?.to_owned()).or_default();
            for dependency in node.get("deps")?.as_array()? {
                let kinds = dependency.get("dep_kinds")?.as_array()?;
                // A null kind is a normal dependency; `dev` and `build` are the others.
                if kinds.iter().any(|kind| kind.get("kind").is_some_and(Value::is_null)) {
                    dependencies.insert(dependency.get("pkg")?.as_str()?.to_owned());
                }
            }
        }
        Some(tree)
    }

    fn name<'a>(&'a self, id: &'a str) -> &'a str {
        self.names.get(id).map_or(id, String::as_str)
    }

    fn reachable(&self, from: &str) -> BTreeSet<&str> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![from];
        while let Some(id) = todo.pop() {
            for next in self.normal.get(id).into_iter().flatten() {
                if seen.insert(self.name(next)) {
                    todo.push(next);
                }
            }
        }
        seen
    }
}

fn violations(tree: &Tree, table: &[Row], nobody: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let member_names: BTreeSet<&str> = tree.members.iter().map(|id| tree.name(id)).collect();
    let known: BTreeSet<&str> = tree.names.values().map(String::as_str).collect();

    for row in table {
        if !member_names.contains(row.name) {
            found.push(format!("the table names `{}`, which is no member of the workspace", row.name));
        }
        for used in row.may_use {
            if !member_names.contains(used) {
                found.push(format!("the row of `{}` allows `{used}`, which is no member of the workspace", row.name));
            }
        }
        for forbidden in row.must_not_reach {
            if !known.contains(forbidden) {
                found.push(format!("the row of `{}` forbids `{forbidden}`, which is in no tree: misspelt?", row.name));
            }
        }
    }
    for id in &tree.members {
        let name = tree.name(id);
        let Some(row) = table.iter().find(|row| row.name == name) else {
            found.push(format!("`{name}` is a member of the workspace but not in the table"));
            continue;
        };
        for dependency in tree.normal.get(id).into_iter().flatten().filter(|id| tree.members.contains(*id)) {
            let dependency = tree.name(dependency);
            if !row.may_use.contains(&dependency) {
                found.push(format!("`{name}` must not depend on `{dependency}`"));
            }
        }
        let reachable = tree.reachable(id);
        for forbidden in row.must_not_reach.iter().chain(nobody).filter(|name| reachable.contains(*name)) {
            found.push(format!("`{name}` must not reach `{forbidden}`"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_follows_the_table_has_no_violation() {
        assert_eq!(
            violations(&tree(&["a -> b", "b -> serde"]), &[row("a", &["b"], &["serde2"]), row("b", &[], &[])], &[]),
            ["the row of `a` forbids `serde2`, which is in no tree: misspelt?"]
        );
        assert!(
            violations(&tree(&["a -> b", "b -> serde"]), &[row("a", &["b"], &[]), row("b", &[], &[])], &["gpl"])
                .is_empty()
        );
    }

    #[test]
    fn every_kind_of_violation_is_found() {
        let cases: &[(&[&str], &[Row], &str)] = &[
            (&["a -> b", "b -> "], &[row("a", &[], &[]), row("b", &[], &[])], "`a` must not depend on `b`"),
            (
                &["a -> x", "x -> tokio"],
                &[row("a", &["x"], &["tokio"]), row("x", &[], &[])],
                "`a` must not reach `tokio`",
            ),
            (&["a -> "], &[row("a", &["bb"], &[])], "the row of `a` allows `bb`, which is no member of the workspace"),
            (
                &["a -> "],
                &[row("a", &[], &[]), row("c", &[], &[])],
                "the table names `c`, which is no member of the workspace",
            ),
            (&["a -> ", "b -> "], &[row("a", &[], &[])], "`b` is a member of the workspace but not in the table"),
            (&["a -> gpl"], &[row("a", &[], &[])], "`a` must not reach `gpl`"),
        ];
        for (lines, table, expected) in cases {
            assert_eq!(violations(&tree(lines), table, &["gpl"]), [*expected]);
        }
    }

    const fn row(name: &'static str, may_use: &'static [&'static str], must_not_reach: &'static [&'static str]) -> Row {
        Row { name, may_use, must_not_reach }
    }

    /// `"a -> b c"`: one member per line; names that are no member are outside crates.
    fn tree(lines: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for line in lines {
            let (name, dependencies) = line.split_once(" -> ").unwrap();
            tree.members.insert(name.to_owned());
            tree.names.insert(name.to_owned(), name.to_owned());
            for dependency in dependencies.split_whitespace() {
                tree.names.insert(dependency.to_owned(), dependency.to_owned());
                tree.normal.entry(name.to_owned()).or_default().insert(dependency.to_owned());
            }
        }
        tree
    }
}
