//! The text that turns what a table holds into what is wanted (netfilter.md 16.4, 16.5).
//!
//! Fed by the table driver with the chains that differ, feeds a restore program. Pure: the same input
//! makes the same bytes (I10). Each transaction is atomic in the kernel, so a packet sees all of it or
//! none of it. Chains are sorted by name; the order of the groups (declare, fill, hook, delete) is fixed.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use program::{BaseChain, Chain, Hooks, Rule, Table};

use super::features::Features;
use super::hash::{APPENDS_SUFFIX, RuleHash, rule_hashes};
use super::parse::Entry;
use super::render::write_rule_line;
use crate::options::{ChainInsertMode, Variant};

/// What is the same for all transactions of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    pub table: Table,
    pub variant: Variant,
    pub insert_mode: ChainInsertMode,
    pub features: Features,
}

/// A chain with the hashes of its rules.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub chain: Arc<Chain>,
    pub hashes: Box<[RuleHash]>,
}

impl Wanted {
    pub fn new(chain: Arc<Chain>, features: &Features) -> Self {
        let hashes = rule_hashes(chain.name.as_str(), &chain.rules, features).into();
        Self { chain, hashes }
    }

    /// Returns whether the kernel holds exactly this.
    pub fn is_in(&self, kernel: &[Option<RuleHash>]) -> bool {
        kernel.len() == self.hashes.len() && kernel.iter().zip(&self.hashes).all(|(have, want)| *have == Some(*want))
    }

    fn rules(&self) -> impl Iterator<Item = (&Rule, RuleHash)> {
        self.chain.rules.iter().zip(self.hashes.iter().copied())
    }
}

/// The hooks of one base chain with their hashes.
#[derive(Clone, Debug, Default)]
pub struct WantedHooks {
    hooks: Hooks,
    inserts: Vec<RuleHash>,
    appends: Vec<RuleHash>,
}

impl WantedHooks {
    /// Appended rules are hashed under another name, so that an inserted and an appended copy of one rule
    /// differ (15.1, item 4).
    pub fn new(base: BaseChain, hooks: Hooks, features: &Features) -> Self {
        let inserts = rule_hashes(base.as_str(), &hooks.inserts, features);
        let appends = rule_hashes(&format!("{}{APPENDS_SUFFIX}", base.as_str()), &hooks.appends, features);
        Self { hooks, inserts, appends }
    }

    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    pub fn is_empty(&self) -> bool {
        self.inserts.is_empty() && self.appends.is_empty()
    }

    /// Returns whether our rules are where they belong among the foreign ones, each exactly once.
    pub fn are_in(&self, kernel: &[Entry], mode: ChainInsertMode) -> bool {
        let foreign = kernel.iter().filter(|entry| **entry == Entry::Foreign).count();
        let others = std::iter::repeat_n(None, foreign);
        let inserts = self.inserts.iter().copied().map(Some);
        let appends = self.appends.iter().copied().map(Some);
        let is_same = |expected: &mut dyn Iterator<Item = Option<RuleHash>>| {
            kernel.iter().all(|entry| match (entry, expected.next()) {
                (Entry::Foreign, Some(None)) => true,
                (Entry::Ours { hash, .. } | Entry::Numbered { hash, .. }, Some(Some(wanted))) => *hash == Some(wanted),
                (Entry::Foreign | Entry::Ours { .. } | Entry::Numbered { .. }, _) => false,
            }) && expected.next().is_none()
        };
        match mode {
            ChainInsertMode::Insert => is_same(&mut inserts.chain(others).chain(appends)),
            ChainInsertMode::Append => is_same(&mut others.chain(inserts).chain(appends)),
        }
    }

    /// Returns what the base chain holds once these hooks were written into it.
    pub fn written(&self, before: &[Entry], setup: &Setup) -> Vec<Entry> {
        let foreign = before.iter().filter(|entry| **entry == Entry::Foreign).cloned();
        let ours = |rules: &[Rule], hashes: &[RuleHash]| {
            let entry = |(rule, hash): (&Rule, &RuleHash)| {
                let mut text = String::new();
                write_rule_line(&mut text, "", rule, *hash, &setup.features);
                Entry::Ours { hash: Some(*hash), rule: text.trim_start().into() }
            };
            rules.iter().zip(hashes).map(entry).collect::<Vec<_>>()
        };
        let inserts = ours(&self.hooks.inserts, &self.inserts).into_iter();
        let appends = ours(&self.hooks.appends, &self.appends);
        match setup.insert_mode {
            ChainInsertMode::Insert => inserts.chain(foreign).chain(appends).collect(),
            ChainInsertMode::Append => foreign.chain(inserts).chain(appends).collect(),
        }
    }
}

/// A chain of ours that differs.
#[derive(Clone, Copy, Debug)]
pub enum Edit<'a> {
    /// `old` is what the kernel has; `None` if it has no such chain.
    Write {
        new: &'a Wanted,
        old: Option<&'a [Option<RuleHash>]>,
    },
    Delete {
        name: &'a str,
    },
    /// Something foreign refers to the chain: it cannot go, but it can be empty.
    Flush {
        name: &'a str,
    },
}

/// A shared chain in which our rules differ.
#[derive(Clone, Copy, Debug)]
pub struct HookEdit<'a> {
    pub name: &'a str,
    pub new: &'a WantedHooks,
    pub old: &'a [Entry],
}

/// Returns the input of a restore program: one transaction, or two if the nft variant must delete chains
/// (it checks references as of the start of the transaction). Empty if there is nothing to do. Edits come
/// sorted by chain name.
pub fn restore_input(setup: &Setup, edits: &[Edit<'_>], hooks: &[HookEdit<'_>]) -> String {
    let mut text = String::new();
    let mut transaction = |body: &dyn Fn(&mut Body<'_>)| {
        let start = text.len();
        show(&mut text, format_args!("*{}\n", setup.table.as_str()));
        let head = text.len();
        body(&mut Body { text: &mut text, setup });
        if text.len() == head {
            text.truncate(start);
        } else {
            text.push_str("COMMIT\n");
        }
    };
    match setup.variant {
        Variant::Legacy => transaction(&|body| {
            edits.iter().for_each(|edit| body.declare_in_place(edit));
            edits.iter().for_each(|edit| body.rewrite_in_place(edit));
            hooks.iter().for_each(|hook| body.hook(hook));
            edits.iter().for_each(|edit| body.delete(edit));
        }),
        Variant::Nft => {
            transaction(&|body| {
                edits.iter().for_each(|edit| body.declare(edit));
                edits.iter().for_each(|edit| body.write_whole(edit));
                hooks.iter().for_each(|hook| body.hook(hook));
            });
            transaction(&|body| {
                edits.iter().filter(|edit| matches!(edit, Edit::Delete { .. })).for_each(|edit| body.declare(edit));
                edits.iter().for_each(|edit| body.delete(edit));
            });
        }
    }
    text
}

/// Name of the chain that probes are written into. It exists only between two transactions of one input.
pub const PROBE_CHAIN: &str = "cali-probe";

/// Returns input that tries rules in a chain that nothing refers to and removes it again: the kernel
/// judges the rules and no packet meets them. Jumps between chains are left out; the rest of the rule is
/// what it is.
pub fn probe_input<'a>(setup: &Setup, rules: impl Iterator<Item = &'a Rule>) -> String {
    let table = setup.table.as_str();
    let mut text = format!("*{table}\n:{PROBE_CHAIN} - -\n");
    for rule in rules {
        text.push_str("-A ");
        text.push_str(PROBE_CHAIN);
        let mut rule = rule.clone();
        if rule.target().is_some() {
            rule.action = None;
        }
        super::render::write_tail(&mut text, &rule, &setup.features);
        text.push('\n');
    }
    show(&mut text, format_args!("COMMIT\n*{table}\n:{PROBE_CHAIN} - -\n--delete-chain {PROBE_CHAIN}\nCOMMIT\n"));
    text
}

/// The lines of one transaction.
struct Body<'a> {
    text: &'a mut String,
    setup: &'a Setup,
}

impl Body<'_> {
    /// Makes or flushes the chain.
    fn declare(&mut self, edit: &Edit<'_>) {
        let name = match edit {
            Edit::Write { new, .. } => new.chain.name.as_str(),
            Edit::Delete { name } | Edit::Flush { name } => name,
        };
        show(self.text, format_args!(":{name} - -\n"));
    }

    /// Makes or flushes the chain unless it is to be edited rule by rule.
    fn declare_in_place(&mut self, edit: &Edit<'_>) {
        match edit {
            Edit::Write { old: Some(_), .. } => {}
            Edit::Write { old: None, .. } | Edit::Delete { .. } | Edit::Flush { .. } => self.declare(edit),
        }
    }

    /// Replaces what differs, from the first difference on; the head of the chain keeps its counters.
    fn rewrite_in_place(&mut self, edit: &Edit<'_>) {
        let Edit::Write { new, old } = edit else { return };
        let old = old.unwrap_or_default();
        let name = new.chain.name.as_str();
        for (index, (rule, hash)) in new.rules().enumerate() {
            match old.get(index) {
                Some(have) if *have == Some(hash) => {}
                Some(_) => self.rule(format_args!("-R {name} {}", index + 1), rule, hash),
                None => self.rule(format_args!("-A {name}"), rule, hash),
            }
        }
        for _ in new.hashes.len()..old.len() {
            show(self.text, format_args!("-D {name} {}\n", new.hashes.len() + 1));
        }
    }

    /// Writes the chain from its first rule on. `iptables-nft-restore` before 1.8.3 miscounts when several
    /// rules of one chain are replaced by number.
    fn write_whole(&mut self, edit: &Edit<'_>) {
        let Edit::Write { new, .. } = edit else { return };
        for (rule, hash) in new.rules() {
            self.rule(format_args!("-A {}", new.chain.name), rule, hash);
        }
    }

    /// Removes every rule of ours by value, which hits the right one even if somebody edited the chain in the
    /// meantime, and puts the wanted ones in their places. Where the program cannot read the chain it cannot look for
    /// a value either; such rules are removed by number afterwards.
    fn hook(&mut self, edit: &HookEdit<'_>) {
        let name = edit.name;
        for entry in edit.old {
            match entry {
                Entry::Foreign | Entry::Numbered { .. } => {}
                Entry::Ours { rule, .. } => show(self.text, format_args!("-D {name} {rule}\n")),
            }
        }
        let inserts = edit.new.hooks.inserts.iter().zip(edit.new.inserts.iter().copied());
        match self.setup.insert_mode {
            ChainInsertMode::Insert => {
                for (rule, hash) in inserts.rev() {
                    self.rule(format_args!("-I {name}"), rule, hash);
                }
            }
            ChainInsertMode::Append => {
                for (rule, hash) in inserts {
                    self.rule(format_args!("-A {name}"), rule, hash);
                }
            }
        }
        for (rule, hash) in edit.new.hooks.appends.iter().zip(edit.new.appends.iter().copied()) {
            self.rule(format_args!("-A {name}"), rule, hash);
        }
    }

    fn delete(&mut self, edit: &Edit<'_>) {
        match edit {
            Edit::Delete { name } => show(self.text, format_args!("--delete-chain {name}\n")),
            Edit::Write { .. } | Edit::Flush { .. } => {}
        }
    }

    fn rule(&mut self, op: fmt::Arguments<'_>, rule: &Rule, hash: RuleHash) {
        show(self.text, op);
        write_rule_line(self.text, "", rule, hash, &self.setup.features);
        self.text.push('\n');
    }
}

/// Appends formatted text; a `String` takes everything.
fn show(out: &mut String, text: fmt::Arguments<'_>) {
    let written = out.write_fmt(text);
    debug_assert!(written.is_ok());
}
