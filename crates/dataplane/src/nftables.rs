//! Who changed which chain: the notifications of nf_tables, and the rules of single chains.
//!
//! Feeds [`crate::iptables::tools`]. The kernel sends what a transaction changed and then a message with the number
//! of the new generation and, since 4.16, the process that made it (users.md section 0, rule 4). Only the messages of
//! one family are looked at, and of them only the names of tables and chains.
//!
//! Invariants: a transaction is reported once and whole, at its generation message, also one that is about something
//! else; after messages were lost [`Heard::lost`] says so, and everything is in doubt.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use model::Family;
use netlink_sys::{AsyncSocket as _, TokioSocket};
use nix::errno::Errno;
use program::Table;

use crate::iptables::hash::RuleHash;
use crate::iptables::native::{NETFILTER, Native, NativeRule};
use crate::iptables::nfwire::{Notice, notice};
use crate::iptables::parse::{comment_hash, is_our_chain, is_our_comment};
use crate::netlink::{each_message, force_receive_buffer};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// Larger than any datagram of notifications.
const DATAGRAM: usize = 1 << 16;
/// Before a socket is asked again that gave an error.
const PAUSE: Duration = Duration::from_millis(100);

/// Room for the notifications of the transactions of some seconds.
const RECEIVE_BUFFER: usize = 8 << 20;

/// Chains of one transaction that are told apart; of more than these the whole table is in doubt.
const MOST_CHAINS: usize = 512;

/// A process as the kernel names it: its thread, and 15 bytes of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub name: Box<str>,
}

/// What of a table was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    All,
    Chains(BTreeSet<Box<str>>),
}

/// One transaction of anybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Commit {
    /// Each transaction has the number after that of the one before it.
    pub(crate) generation: Option<u32>,
    /// What it changed of the family's tables.
    pub(crate) tables: BTreeMap<Table, Touched>,
    /// `None` on kernels that do not tell.
    pub(crate) process: Option<Process>,
}

/// What was heard since it was last asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) commits: Vec<Commit>,
    /// Messages were lost.
    pub(crate) lost: bool,
}

/// A subscription to the notifications of one family.
pub(crate) struct Monitor {
    socket: TokioSocket,
    listener: Listener,
    buffer: Vec<u8>,
    heard: Heard,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Monitor {
    /// Subscribes, in the network namespace of the calling thread; must be called inside a runtime.
    ///
    /// # Errors
    ///
    /// If the kernel has no nf_tables or refuses.
    pub(crate) fn new(family: Family) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETFILTER)?;
        let inner = socket.socket_mut();
        force_receive_buffer(inner, RECEIVE_BUFFER);
        inner.bind_auto()?;
        inner.add_membership(GROUP)?;
        let listener = Listener { family, open: BTreeMap::new() };
        Ok(Self { socket, listener, buffer: Vec::with_capacity(DATAGRAM), heard: Heard::default() })
    }

    /// Takes what has arrived, without waiting.
    pub(crate) fn drain(&mut self) -> Heard {
        loop {
            self.buffer.clear();
            let received = self.socket.socket_ref().recv(&mut self.buffer, nix::libc::MSG_TRUNC);
            if !self.take(received) {
                return std::mem::take(&mut self.heard);
            }
        }
    }

    /// Waits until something has arrived. May be given up at any time.
    pub(crate) async fn readable(&mut self) {
        let received = std::future::poll_fn(|context| {
            self.buffer.clear();
            self.socket.poll_recv(context, &mut self.buffer)
        });
        let received = received.await.map(|()| self.buffer.len());
        if !self.take(received) {
            // Never in a circle, whatever is the matter with the socket.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Takes one datagram, which is in the buffer; false if there was none.
    fn take(&mut self, received: io::Result<usize>) -> bool {
        let Self { listener, buffer, heard, .. } = self;
        match received {
            Ok(length) if length > buffer.len() => heard.lost = true,
            Ok(_) => heard.lost |= !listener.take(buffer, &mut heard.commits),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                heard.lost = true;
                listener.open.clear();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) => {
                heard.lost = true;
                return false;
            }
        }
        true
    }
}

/// Puts messages together to transactions.
#[derive(Debug)]
struct Listener {
    family: Family,
    /// What the transaction has changed whose generation message is still to come.
    open: BTreeMap<Table, Touched>,
}

impl Listener {
    /// Takes one datagram; false if it is malformed.
    fn take(&mut self, datagram: &[u8], commits: &mut Vec<Commit>) -> bool {
        for message in each_message(datagram) {
            let notice = message.and_then(|(kind, payload)| notice(kind, payload, self.family));
            match notice {
                None => return false,
                Some(Notice::Other) => {}
                Some(Notice::Generation { number, process }) => {
                    let process = process.map(|(pid, name)| Process { pid, name: name.into() });
                    commits.push(Commit { generation: number, tables: std::mem::take(&mut self.open), process });
                }
                Some(Notice::TableGone(table)) => self.touch(table, None),
                Some(Notice::Chain(table, chain)) => self.touch(table, Some(chain)),
            }
        }
        true
    }

    fn touch(&mut self, table: &str, chain: Option<&str>) {
        let Some(table) = Table::ALL.into_iter().find(|known| known.as_str() == table) else { return };
        let touched = self.open.entry(table).or_insert_with(|| Touched::Chains(BTreeSet::new()));
        match (chain, &mut *touched) {
            (Some(chain), Touched::Chains(chains)) if chains.len() < MOST_CHAINS || chains.contains(chain) => {
                chains.insert(chain.into());
            }
            (_, Touched::All) => {}
            (_, Touched::Chains(_)) => *touched = Touched::All,
        }
    }
}

/// A rule in the kernel, as far as it can be ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadRule {
    /// The hash in its first comment of ours.
    pub hash: Option<RuleHash>,
    /// It has a comment of ours or leads to a chain of ours.
    pub is_ours: bool,
}

/// Reads the rules of one chain; a chain that is not there has none.
///
/// # Errors
///
/// If the kernel does not give a complete list.
pub(crate) fn read_chain(native: &mut Native, table: Table, chain: &str) -> io::Result<Vec<ReadRule>> {
    /// Lists that were changed while they were read are read again, this often.
    const ATTEMPTS: u32 = 3;
    for _ in 0..ATTEMPTS {
        match native.rules(table.as_str(), Some(chain)) {
            // Old kernels list the whole table.
            Ok(rules) => return Ok(rules.iter().filter(|rule| &*rule.chain == chain).map(read_rule).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("the chain changes faster than it can be read"))
}

fn read_rule(rule: &NativeRule) -> ReadRule {
    let comment = rule.comments.iter().find(|comment| is_our_comment(comment));
    ReadRule {
        hash: comment.and_then(|comment| comment_hash(comment)),
        is_ours: comment.is_some() || rule.jump.as_deref().is_some_and(is_our_chain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iptables::nfwire::tests::notification;

    const NEW_RULE: u16 = 6;
    const NEW_GENERATION: u16 = 15;
    const DELETED_TABLE: u16 = 2;

    fn message(kind: u16, family: Family, fields: &[(u16, Vec<u8>)]) -> Vec<u8> {
        notification(kind, family, fields)
    }

    fn rule_in(family: Family, table: &str, chain: &str) -> Vec<u8> {
        let text = |kind, value: &str| (kind, format!("{value}\0").into_bytes());
        message(NEW_RULE, family, &[text(1, table), text(2, chain)])
    }

    fn generation(pid: u32, name: &str) -> Vec<u8> {
        let fields = [
            (1, (pid + 100).to_be_bytes().to_vec()),
            (2, pid.to_be_bytes().to_vec()),
            (3, format!("{name}\0").into_bytes()),
        ];
        message(NEW_GENERATION, Family::V4, &fields)
    }

    fn listener() -> Listener {
        Listener { family: Family::V4, open: BTreeMap::new() }
    }

    #[test]
    fn a_transaction_is_told_whole_with_its_process() {
        let mut listener = listener();
        let mut commits = Vec::new();
        assert!(
            listener
                .take(&[rule_in(Family::V4, "filter", "a"), rule_in(Family::V4, "raw", "b")].concat(), &mut commits)
        );
        assert_eq!(commits, []);
        assert!(listener.take(&[rule_in(Family::V4, "filter", "c"), generation(5, "x")].concat(), &mut commits));
        let chains = |names: &[&str]| Touched::Chains(names.iter().map(|name| (*name).into()).collect());
        let tables = BTreeMap::from([(Table::Filter, chains(&["a", "c"])), (Table::Raw, chains(&["b"]))]);
        let process = Some(Process { pid: 5, name: "x".into() });
        assert_eq!(commits, [Commit { generation: Some(105), tables, process }]);
    }

    #[test]
    fn of_other_families_other_tables_and_transactions_without_rules_only_the_number_is_news() {
        let mut listener = listener();
        let mut commits = Vec::new();
        let datagram = [
            rule_in(Family::V6, "filter", "a"),
            rule_in(Family::V4, "mine", "a"),
            generation(5, "x"),
            generation(6, "y"),
        ];
        assert!(listener.take(&datagram.concat(), &mut commits));
        let heard: Vec<_> = commits.iter().map(|commit| (commit.generation, commit.tables.len())).collect();
        assert_eq!(heard, [(Some(105), 0), (Some(106), 0)]);
    }

    #[test]
    fn a_deleted_table_and_too_many_chains_put_all_of_the_table_in_doubt() {
        let mut listener = listener();
        let mut commits = Vec::new();
        let deleted = message(DELETED_TABLE, Family::V4, &[(1, b"filter\0".to_vec())]);
        listener.take(&[deleted, generation(5, "nft")].concat(), &mut commits);
        for number in 0..=MOST_CHAINS {
            listener.take(&rule_in(Family::V4, "raw", &format!("chain-{number}")), &mut commits);
        }
        listener.take(&generation(5, "nft"), &mut commits);
        assert_eq!(commits[0].tables, BTreeMap::from([(Table::Filter, Touched::All)]));
        assert_eq!(commits[1].tables, BTreeMap::from([(Table::Raw, Touched::All)]));
    }

    #[test]
    fn malformed_datagrams_count_as_lost() {
        let mut bytes = rule_in(Family::V4, "filter", "a");
        bytes[0] = 200;
        assert!(!listener().take(&bytes, &mut Vec::new()));
    }

    #[test]
    fn a_rule_is_ours_by_its_comment_or_by_where_it_jumps() {
        let rule = |comments: &[&str], jump: Option<&str>| {
            let comments = comments.iter().map(|text| (*text).into()).collect();
            read_rule(&NativeRule { comments, jump: jump.map(Into::into), ..NativeRule::default() })
        };
        let hash = RuleHash::parse("AAAAAAAAAAAAAAAA");
        let ours = ReadRule { hash, is_ours: true };
        assert_eq!(rule(&["hello", "cali:AAAAAAAAAAAAAAAA", "cali:BBBBBBBBBBBBBBBB"], None), ours);
        assert_eq!(rule(&[], Some("cali-a")), ReadRule { hash: None, is_ours: true });
        assert_eq!(rule(&["hello"], Some("DOCKER")), ReadRule::default());
    }
}
