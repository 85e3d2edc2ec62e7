//! Looks at tables of the nft variant over netlink, where its save program cannot or must not be asked.
//!
//! Fed by [`super::tools`] (a table that the program cannot represent), [`super::evidence`] (what the host uses),
//! [`super::leftovers`] and the canary. Looking makes nothing. A view exists only if no other transaction went in
//! while it was read (I3).

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use model::Family;
use program::Table;

use super::nfwire::{self, Dump};
pub use super::nfwire::{NativeChain, NativeRule, Removal};
use super::parse::{Entry, View, comment_hash, is_base_chain, is_our_chain, is_our_comment};
use crate::netlink::{Channel, DumpEnd};

/// `NETLINK_NETFILTER`.
pub(crate) const NETFILTER: isize = 12;

/// Reads of a table that others keep changing, before we give up for this time.
const ATTEMPTS: u32 = 8;

/// A socket to nf_tables.
#[derive(Debug)]
pub struct Native {
    channel: Channel,
    family: Family,
}

impl Native {
    /// Allocates; the socket is opened by the first request.
    pub fn new(family: Family, timeout: Duration) -> Self {
        Self { channel: Channel::new(NETFILTER, timeout, false), family }
    }

    /// Returns the number of the last transaction of anybody.
    ///
    /// # Errors
    ///
    /// If the kernel has no nf_tables or does not answer.
    pub fn generation(&mut self) -> io::Result<u32> {
        let sequence = self.channel.sequences(1);
        let request = nfwire::get_generation(self.family, sequence);
        let answer = self.channel.ask(&request, sequence)?.map_err(|refusal| refused(refusal.code))?;
        answer.as_deref().and_then(nfwire::generation).ok_or_else(malformed)
    }

    /// Returns the names of the family's tables.
    ///
    /// # Errors
    ///
    /// As [`Self::generation`].
    pub fn tables(&mut self) -> io::Result<BTreeSet<Box<str>>> {
        Ok(self.list(Dump::Tables, nfwire::table)?.into_iter().collect())
    }

    /// Returns all chains of the family.
    ///
    /// # Errors
    ///
    /// As [`Self::generation`].
    pub fn chains(&mut self) -> io::Result<Vec<NativeChain>> {
        self.list(Dump::Chains, nfwire::chain)
    }

    /// Returns the rules of a table, or of one of its chains, in order.
    ///
    /// # Errors
    ///
    /// As [`Self::generation`].
    pub fn rules(&mut self, table: &str, chain: Option<&str>) -> io::Result<Vec<NativeRule>> {
        self.list(Dump::Rules { table, chain }, nfwire::rule)
    }

    /// Returns what one table holds, as far as it concerns us.
    ///
    /// # Errors
    ///
    /// As [`Self::generation`], and if others keep changing it.
    pub fn view(&mut self, table: Table) -> io::Result<View> {
        self.undisturbed(|native| {
            let chains = native.chains()?;
            let chains: Vec<_> = chains.into_iter().filter(|chain| &*chain.table == table.as_str()).collect();
            let rules = if chains.is_empty() { Vec::new() } else { native.rules(table.as_str(), None)? };
            Ok(view_of(&chains, &rules))
        })
    }

    /// Does `read` again until nobody's transaction went in meanwhile.
    fn undisturbed<T>(&mut self, mut read: impl FnMut(&mut Self) -> io::Result<T>) -> io::Result<T> {
        for _ in 0..ATTEMPTS {
            let before = self.generation()?;
            match read(self) {
                Ok(result) if self.generation()? == before => return Ok(result),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("nf_tables changes all the time"))
    }

    /// Removes all of it in one transaction, or nothing. Nothing is no transaction.
    ///
    /// # Errors
    ///
    /// With the kernel's number if it refuses.
    pub fn remove(&mut self, removals: &[Removal]) -> io::Result<()> {
        if removals.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(removals.len()).map_err(|_| io::Error::other("too many removals"))?;
        let first = self.channel.sequences(count.saturating_add(2));
        let batch = nfwire::removal_batch(self.family, removals, first);
        for outcome in self.channel.acknowledged(&batch, first + 1, count)? {
            outcome.map_err(|refusal| refused(refusal.code))?;
        }
        Ok(())
    }

    fn list<T>(&mut self, what: Dump<'_>, decode: impl Fn(&[u8]) -> Option<T>) -> io::Result<Vec<T>> {
        let sequence = self.channel.sequences(1);
        let request = nfwire::dump(what, self.family, sequence);
        let mut list = Vec::new();
        let mut whole = true;
        let end = self.channel.dump(&request, sequence, |payload| match decode(payload) {
            Some(item) => list.push(item),
            None => whole = false,
        })?;
        match end {
            DumpEnd::Complete if whole => Ok(list),
            DumpEnd::Complete => Err(malformed()),
            DumpEnd::Interrupted => Err(io::ErrorKind::Interrupted.into()),
            DumpEnd::Refused(code) => Err(refused(code)),
        }
    }
}

fn refused(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "nf_tables answered something malformed")
}

/// Returns what chains and rules of one table mean to us. The rules without a mark that agents before 2.0 put into nat
/// cannot be told here.
pub fn view_of(chains: &[NativeChain], rules: &[NativeRule]) -> View {
    let mut view = View::default();
    for chain in chains {
        if is_our_chain(&chain.name) {
            view.ours.entry(chain.name.clone()).or_default();
        } else {
            view.shared.entry(chain.name.clone()).or_default();
        }
    }
    for rule in rules {
        let hash = rule.comments.iter().find(|comment| is_our_comment(comment)).map(|comment| comment_hash(comment));
        if let Some(rules) = view.ours.get_mut(&rule.chain) {
            rules.push(hash.flatten());
            continue;
        }
        let Some(entries) = view.shared.get_mut(&rule.chain) else { continue };
        let jumps_to_us = rule.jump.as_deref().is_some_and(is_our_chain);
        if hash.is_none() && !jumps_to_us {
            entries.push(Entry::Foreign);
            continue;
        }
        entries.push(Entry::Numbered { hash: hash.flatten(), handle: rule.handle });
    }
    view.shared.retain(|name, rules| is_base_chain(name) || rules.iter().any(|rule| *rule != Entry::Foreign));
    view
}
