//! One table of one family: its chains, who needs which, and what changed (netfilter.md 16.2).
//!
//! Fed by [`crate::Compiler`] with chains and hooks, feeds the `tables` of the changes.
//!
//! Invariants:
//! - a chain is told to the dataplane exactly while a hook leads to it, directly or through other chains;
//! - after [`TableProgram::finish`] no rule that was told names a chain that was not;
//! - a chain whose contents are what they were is not told again.
//!
//! Policy and profile chains are *lazy*: nobody defines them until they are needed
//! ([`TableProgram::missing`]), and their contents are forgotten when they no longer are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use foldhash::fast::RandomState;
use program::{BaseChain, Chain, ChainName, Hooks, Rule, TableChanges};

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct TableProgram {
    entries: HashMap<ChainName, Entry, RandomState>,
    hooks: BTreeMap<BaseChain, Hooks>,
    changed_hooks: BTreeSet<BaseChain>,
    /// May differ from what was told.
    dirty: BTreeSet<ChainName>,
    /// Needed but not defined.
    missing: BTreeSet<ChainName>,
}

#[derive(Debug, Default)]
struct Entry {
    contents: Option<Arc<Chain>>,
    lazy: bool,
    /// Rules of hooks and of needed chains that lead here, plus one if it is forced.
    uses: usize,
    forced: bool,
    told: Option<Arc<Chain>>,
}

impl TableProgram {
    /// Sets the contents of a chain; it is told when it is needed.
    pub fn define(&mut self, chain: Arc<Chain>) {
        self.set(chain, false);
    }

    /// Sets the contents of a chain that [`Self::missing`] asked for, or that is still needed.
    pub fn define_lazy(&mut self, chain: Arc<Chain>) {
        self.set(chain, true);
    }

    /// Forgets the contents of a chain. If it is needed it becomes missing.
    pub fn undefine(&mut self, name: &ChainName) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let Some(old) = entry.contents.take() else { return };
        self.dirty.insert(name.clone());
        if entry.uses > 0 {
            self.missing.insert(name.clone());
            self.release(old.targets().cloned().collect());
        }
    }

    /// Sets the hook rules of a base chain.
    pub fn set_hooks(&mut self, base: BaseChain, hooks: Hooks) {
        let targets = |hooks: &Hooks| -> Vec<ChainName> {
            hooks.inserts.iter().chain(&hooks.appends).filter_map(Rule::target).cloned().collect()
        };
        let new = targets(&hooks);
        let old = self.hooks.insert(base, hooks);
        self.changed_hooks.insert(base);
        self.acquire(new);
        self.release(old.as_ref().map(targets).unwrap_or_default());
    }

    /// Keeps a chain in the table whether or not a rule leads to it.
    pub fn force(&mut self, name: &ChainName, forced: bool) {
        if !forced && !self.entries.contains_key(name) {
            return;
        }
        let entry = self.entries.entry(name.clone()).or_default();
        if std::mem::replace(&mut entry.forced, forced) == forced {
            return;
        }
        if forced {
            self.acquire(vec![name.clone()]);
        } else {
            self.release(vec![name.clone()]);
        }
    }

    /// True while a hook leads to the chain.
    pub fn is_needed(&self, name: &ChainName) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.uses > 0)
    }

    /// The first chain that is needed and not defined.
    pub fn missing(&self) -> Option<&ChainName> {
        self.missing.first()
    }

    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        self.entries.len()
    }

    /// Returns what changed since the last call. Nothing may be missing.
    pub fn finish(&mut self) -> TableChanges {
        debug_assert!(self.missing.is_empty(), "jump targets without contents: {:?}", self.missing);
        let mut changes = TableChanges::default();
        for base in std::mem::take(&mut self.changed_hooks) {
            changes.hooks.insert(base, self.hooks.get(&base).cloned().unwrap_or_default());
        }
        // In order already, so that the map is built at one go.
        let mut told = Vec::with_capacity(self.dirty.len());
        for name in std::mem::take(&mut self.dirty) {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            if entry.uses == 0 && entry.lazy {
                entry.contents = None;
            }
            let wanted = entry.contents.as_ref().filter(|_| entry.uses > 0);
            if wanted != entry.told.as_ref() {
                entry.told = wanted.cloned();
                told.push((name.clone(), entry.told.clone()));
            } else if let Some(told) = &entry.told {
                // Equal contents: keep one copy of them.
                entry.contents = Some(Arc::clone(told));
            }
            if entry.uses == 0 && entry.contents.is_none() {
                self.entries.remove(&name);
            }
        }
        changes.chains = told.into_iter().collect();
        changes
    }

    fn set(&mut self, chain: Arc<Chain>, lazy: bool) {
        let name = chain.name.clone();
        let entry = self.entries.entry(name.clone()).or_default();
        entry.lazy = lazy;
        let old = entry.contents.replace(Arc::clone(&chain));
        self.dirty.insert(name.clone());
        if entry.uses > 0 {
            self.missing.remove(&name);
            // New references first, so that what both name is not let go in between.
            self.acquire(chain.targets().cloned().collect());
            self.release(old.map(|old| old.targets().cloned().collect()).unwrap_or_default());
        }
    }

    /// Counts uses up. Chains that become needed count up what they lead to.
    fn acquire(&mut self, mut names: Vec<ChainName>) {
        while let Some(name) = names.pop() {
            let entry = self.entries.entry(name.clone()).or_default();
            entry.uses += 1;
            if entry.uses > 1 {
                continue;
            }
            match &entry.contents {
                Some(chain) => names.extend(chain.targets().cloned()),
                None => {
                    self.missing.insert(name.clone());
                }
            }
            self.dirty.insert(name);
        }
    }

    /// The mirror image of [`Self::acquire`].
    fn release(&mut self, mut names: Vec<ChainName>) {
        while let Some(name) = names.pop() {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            debug_assert!(entry.uses > 0, "{name} released more often than acquired");
            entry.uses = entry.uses.saturating_sub(1);
            if entry.uses > 0 {
                continue;
            }
            if let Some(chain) = &entry.contents {
                names.extend(chain.targets().cloned());
            }
            self.missing.remove(&name);
            self.dirty.insert(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::Action;

    fn name(text: &str) -> ChainName {
        ChainName::fixed(text)
    }

    fn chain(text: &str, targets: &[&str]) -> Arc<Chain> {
        let rules = targets.iter().map(|target| Rule::new(Vec::new(), Action::Jump(name(target)))).collect();
        Arc::new(Chain { name: name(text), rules })
    }

    fn hooked(targets: &[&str]) -> TableProgram {
        let mut table = TableProgram::default();
        let inserts = chain("x", targets).rules.clone();
        table.set_hooks(BaseChain::Input, Hooks { inserts, appends: Vec::new() });
        table
    }

    /// `+name` for contents, `-name` for a removal.
    fn told(table: &mut TableProgram) -> Vec<String> {
        let changes = table.finish();
        changes
            .chains
            .iter()
            .map(|(name, chain)| format!("{}{name}", if chain.is_some() { '+' } else { '-' }))
            .collect()
    }

    #[test]
    fn only_chains_that_a_hook_leads_to_are_told() {
        let mut table = hooked(&["a"]);
        table.define(chain("a", &["b", "b"]));
        table.define(chain("b", &["c"]));
        table.define(chain("c", &[]));
        table.define(chain("loose", &["c"]));
        assert_eq!(told(&mut table), ["+a", "+b", "+c"]);
        // One of two references goes: nothing but the chain itself changes.
        table.define(chain("a", &["b"]));
        assert_eq!(told(&mut table), ["+a"]);
        table.define(chain("a", &[]));
        assert_eq!(told(&mut table), ["+a", "-b", "-c"]);
        table.define(chain("a", &["b"]));
        assert_eq!(told(&mut table), ["+a", "+b", "+c"]);
    }

    #[test]
    fn equal_contents_are_not_told_again() {
        let mut table = hooked(&["a"]);
        table.define(chain("a", &[]));
        assert_eq!(told(&mut table), ["+a"]);
        table.define(chain("a", &[]));
        assert_eq!(told(&mut table), [""; 0]);
    }

    #[test]
    fn lazy_chains_are_asked_for_when_needed_and_forgotten_afterwards() {
        let mut table = hooked(&["a"]);
        table.define(chain("a", &["p"]));
        assert_eq!(table.missing(), Some(&name("p")));
        table.define_lazy(chain("p", &[]));
        assert_eq!(table.missing(), None);
        assert_eq!(told(&mut table), ["+a", "+p"]);
        table.define(chain("a", &[]));
        assert_eq!(told(&mut table), ["+a", "-p"]);
        assert!(!table.entries.contains_key(&name("p")));
        // Needed, unneeded and needed again in one batch.
        table.define(chain("a", &["p"]));
        table.define(chain("a", &[]));
        assert_eq!(table.missing(), None);
        assert_eq!(told(&mut table), [""; 0]);
    }

    #[test]
    fn a_chain_that_loses_its_contents_while_needed_is_missing() {
        let mut table = hooked(&["a"]);
        table.define(chain("a", &["p"]));
        table.define_lazy(chain("p", &["q"]));
        table.define(chain("q", &[]));
        assert_eq!(told(&mut table), ["+a", "+p", "+q"]);
        table.undefine(&name("p"));
        assert_eq!(table.missing(), Some(&name("p")));
        assert!(!table.is_needed(&name("q")));
        table.define_lazy(chain("p", &[]));
        assert_eq!(told(&mut table), ["+p", "-q"]);
    }

    #[test]
    fn a_forced_chain_stays_without_references() {
        let mut table = TableProgram::default();
        table.force(&name("p"), true);
        table.force(&name("p"), true);
        assert_eq!(table.missing(), Some(&name("p")));
        table.define_lazy(chain("p", &[]));
        assert_eq!(told(&mut table), ["+p"]);
        table.force(&name("p"), false);
        assert_eq!(told(&mut table), ["-p"]);
        assert!(table.entries.is_empty());
    }
}
