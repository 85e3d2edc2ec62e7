//! Messages of nf_tables over netlink: what is in the tables that the nft variant uses, removal by handle, and
//! notifications.
//!
//! Feeds [`super::native`], [`super::leftovers`] and [`crate::nftables`]. Encodes requests and decodes answers; sends
//! nothing. Only what tells our rules from others is decoded: comments, jumps and the first counter. The rest of a rule
//! is opaque, which is the point: nobody's expressions can stop us (U6.d).

use model::Family;

use crate::netlink::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, attributes, finish_message, start_message};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

/// Message types, `NFT_MSG_*`.
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;
const NEW_GENERATION: u16 = 15;
const GET_GENERATION: u16 = 16;

/// `NFT_JUMP`.
const JUMP: i32 = -3;

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeChain {
    pub table: Box<str>,
    pub name: Box<str>,
    /// Packets come to it by themselves.
    pub is_base: bool,
}

/// A rule, as far as it can be ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NativeRule {
    pub table: Box<str>,
    pub chain: Box<str>,
    pub handle: u64,
    /// Texts of comment matches and of the user data, in order.
    pub comments: Vec<Box<str>>,
    /// The chain that it jumps to.
    pub jump: Option<Box<str>>,
    /// Packets that its first counter has seen.
    pub packets: Option<u64>,
    /// It matches by a set or by a type of address, as the rules did that agents before 2.0 put into nat.
    pub matches_like_ancient: bool,
    pub masquerades: bool,
}

const fn protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

fn start(message: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: Family) {
    start_message(message, (SUBSYSTEM << 8) | kind, NLM_F_REQUEST | flags, sequence);
    // struct nfgenmsg: family, version 0, resource 0.
    message.extend([protocol(family), 0, 0, 0]);
}

fn text(message: &mut Vec<u8>, kind: u16, text: &str) {
    attribute(message, kind, |message| {
        message.extend(text.as_bytes());
        message.push(0);
    });
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
    let at = message.len();
    message.extend([0; 2]);
    message.extend(kind.to_ne_bytes());
    value(message);
    let length = u16::try_from(message.len() - at).unwrap_or(u16::MAX);
    if let Some(field) = message.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *field = length.to_ne_bytes();
    }
    message.resize(message.len().next_multiple_of(4), 0);
}

/// What a dump lists.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dump<'a> {
    Tables,
    Chains,
    /// Of one table, or of one chain of it.
    Rules {
        table: &'a str,
        chain: Option<&'a str>,
    },
}

/// A request for a list.
pub(crate) fn dump(what: Dump<'_>, family: Family, sequence: u32) -> Vec<u8> {
    let mut message = Vec::new();
    let kind = match what {
        Dump::Tables => GET_TABLE,
        Dump::Chains => GET_CHAIN,
        Dump::Rules { .. } => GET_RULE,
    };
    start(&mut message, kind, NLM_F_DUMP, sequence, family);
    if let Dump::Rules { table, chain } = what {
        text(&mut message, 1, table);
        if let Some(chain) = chain {
            text(&mut message, 2, chain);
        }
    }
    finish_message(&mut message);
    message
}

/// A request for the number of the current generation, which every transaction of anybody raises.
pub(crate) fn get_generation(family: Family, sequence: u32) -> Vec<u8> {
    let mut message = Vec::new();
    start(&mut message, GET_GENERATION, NLM_F_ACK, sequence, family);
    finish_message(&mut message);
    message
}

pub(crate) fn generation(payload: &[u8]) -> Option<u32> {
    number(&fields(payload)?, 1)
}

/// A notification, as far as it concerns us. Names are those of table and chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice<'a> {
    /// A transaction ends, with its number and, since 4.16, the process that made it.
    Generation { number: Option<u32>, process: Option<(u32, &'a str)> },
    /// A table went with all that is in it.
    TableGone(&'a str),
    /// Something in a chain changed, or the chain itself.
    Chain(&'a str, &'a str),
    /// Of another family, or about something else.
    Other,
}

/// Reads a message to subscribers, by its kind with the subsystem; `None` if it is malformed.
pub(crate) fn notice(kind: u16, payload: &[u8], family: Family) -> Option<Notice<'_>> {
    if kind >> 8 != SUBSYSTEM {
        return Some(Notice::Other);
    }
    let kind = kind & 0xff;
    let is_ours = *payload.first()? == protocol(family);
    if kind == NEW_GENERATION {
        let fields = fields(payload)?;
        let process = number(&fields, 2).map(|pid| (pid, value(&fields, 3).and_then(plain).unwrap_or_default()));
        return Some(Notice::Generation { number: number(&fields, 1), process });
    }
    let chain = match kind {
        DELETE_TABLE => None,
        NEW_CHAIN | DELETE_CHAIN => Some(3),
        NEW_RULE | DELETE_RULE => Some(2),
        // A table that is new is empty; whatever comes into it is told.
        _ => return Some(Notice::Other),
    };
    if !is_ours {
        return Some(Notice::Other);
    }
    let fields = fields(payload)?;
    let name = |wanted| value(&fields, wanted).and_then(plain);
    Some(match (name(1), chain.and_then(name)) {
        (None, _) => Notice::Other,
        (Some(table), Some(chain)) => Notice::Chain(table, chain),
        (Some(table), None) => Notice::TableGone(table),
    })
}

fn value<'a>(fields: &[(u16, &'a [u8])], wanted: u16) -> Option<&'a [u8]> {
    fields.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| *value)
}

fn number(fields: &[(u16, &[u8])], wanted: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*value(fields, wanted)?.first_chunk()?))
}

/// A text that is what it seems.
fn plain(value: &[u8]) -> Option<&str> {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(value.get(..end)?).ok()
}

/// Something to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    Rule {
        table: Box<str>,
        chain: Box<str>,
        handle: u64,
    },
    /// All rules of the chain.
    Rules {
        table: Box<str>,
        chain: Box<str>,
    },
    Chain {
        table: Box<str>,
        chain: Box<str>,
    },
    Table {
        table: Box<str>,
    },
}

/// One transaction: all of it or nothing. The removals have the sequence numbers from `first` + 1 on; begin and end
/// are not acknowledged.
pub(crate) fn removal_batch(family: Family, removals: &[Removal], first: u32) -> Vec<u8> {
    let mut batch = frame(BATCH_BEGIN, first);
    let mut message = Vec::new();
    let mut sequence = first;
    for removal in removals {
        sequence = sequence.wrapping_add(1);
        let kind = match removal {
            Removal::Rule { .. } | Removal::Rules { .. } => DELETE_RULE,
            Removal::Chain { .. } => DELETE_CHAIN,
            Removal::Table { .. } => DELETE_TABLE,
        };
        start(&mut message, kind, NLM_F_ACK, sequence, family);
        match removal {
            Removal::Rule { table, chain, handle } => {
                text(&mut message, 1, table);
                text(&mut message, 2, chain);
                attribute(&mut message, 3, |message| message.extend(handle.to_be_bytes()));
            }
            Removal::Rules { table, chain } => {
                text(&mut message, 1, table);
                text(&mut message, 2, chain);
            }
            Removal::Chain { table, chain } => {
                text(&mut message, 1, table);
                text(&mut message, 3, chain);
            }
            Removal::Table { table } => text(&mut message, 1, table),
        }
        finish_message(&mut message);
        batch.extend(&message);
    }
    batch.extend(frame(BATCH_END, sequence.wrapping_add(1)));
    batch
}

fn frame(kind: u16, sequence: u32) -> Vec<u8> {
    let mut message = Vec::new();
    start_message(&mut message, kind, NLM_F_REQUEST, sequence);
    // struct nfgenmsg: the family is not looked at; the resource is the subsystem, in network order.
    let [high, low] = SUBSYSTEM.to_be_bytes();
    message.extend([0, 0, high, low]);
    finish_message(&mut message);
    message
}

/// Attributes of an answer, after its `struct nfgenmsg`; `None` if it is malformed.
fn fields(payload: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    attributes(payload.get(4..)?).collect()
}

/// The name in a list of tables.
pub(crate) fn table(payload: &[u8]) -> Option<Box<str>> {
    value(&fields(payload)?, 1).map(string)
}

pub(crate) fn chain(payload: &[u8]) -> Option<NativeChain> {
    let (mut table, mut name, mut is_base) = (None, None, false);
    for (kind, value) in fields(payload)? {
        match kind {
            1 => table = Some(string(value)),
            3 => name = Some(string(value)),
            4 => is_base = true,
            _ => {}
        }
    }
    Some(NativeChain { table: table?, name: name?, is_base })
}

pub(crate) fn rule(payload: &[u8]) -> Option<NativeRule> {
    let mut rule = NativeRule::default();
    let mut found = (false, false, false);
    for (kind, value) in fields(payload)? {
        match kind {
            1 => (rule.table, found.0) = (string(value), true),
            2 => (rule.chain, found.1) = (string(value), true),
            3 => (rule.handle, found.2) = (u64::from_be_bytes(*value.first_chunk()?), true),
            4 => {
                for element in attributes(value) {
                    expression(&mut rule, element?.1)?;
                }
            }
            7 => rule.comments.extend(userdata_comment(value)),
            _ => {}
        }
    }
    (found == (true, true, true)).then_some(rule)
}

fn expression(rule: &mut NativeRule, bytes: &[u8]) -> Option<()> {
    let (mut name, mut data) = (String::new(), [].as_slice());
    for field in attributes(bytes) {
        match field? {
            (1, value) => name = string(value).into(),
            (2, value) => data = value,
            _ => {}
        }
    }
    match name.as_str() {
        "match" => {
            let (name, info) = extension(data)?;
            match &*name {
                "comment" => rule.comments.push(string(info)),
                "set" | "addrtype" => rule.matches_like_ancient = true,
                _ => {}
            }
        }
        "target" => rule.masquerades |= &*extension(data)?.0 == "MASQUERADE",
        "masq" => rule.masquerades = true,
        "counter" => {
            for field in attributes(data) {
                if let (2, value) = field? {
                    let packets = u64::from_be_bytes(*value.first_chunk()?);
                    rule.packets.get_or_insert(packets);
                }
            }
        }
        "immediate" => {
            let target = jump(data)?;
            rule.jump = target.or(rule.jump.take());
        }
        _ => {}
    }
    Some(())
}

/// Name and contents of a match or target of xtables.
fn extension(data: &[u8]) -> Option<(Box<str>, &[u8])> {
    let (mut name, mut info) = (Box::default(), [].as_slice());
    for field in attributes(data) {
        match field? {
            (1, value) => name = string(value),
            (3, value) => info = value,
            _ => {}
        }
    }
    Some((name, info))
}

/// The target of a jump; `None` inside for another verdict or a value.
fn jump(data: &[u8]) -> Option<Option<Box<str>>> {
    let (mut code, mut target) = (0, None);
    for field in attributes(data) {
        let (2, value) = field? else { continue };
        for field in attributes(value) {
            let (2, verdict) = field? else { continue };
            for field in attributes(verdict) {
                match field? {
                    (1, value) => code = i32::from_be_bytes(*value.first_chunk()?),
                    (2, value) => target = Some(string(value)),
                    _ => {}
                }
            }
        }
    }
    Some(target.filter(|_| code == JUMP))
}

/// The comment of `nft`, and of the first programs of the nft variant: type 0 among entries of type, length, value.
fn userdata_comment(mut bytes: &[u8]) -> Option<Box<str>> {
    loop {
        let [kind, length, rest @ ..] = bytes else { return None };
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(string(value));
        }
        bytes = rest.get(usize::from(*length)..)?;
    }
}

fn string(bytes: &[u8]) -> Box<str> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A whole message to subscribers.
    pub(crate) fn notification(kind: u16, family: Family, parts: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut message = Vec::new();
        start(&mut message, kind, 0, 0, family);
        message.extend(nest(parts));
        finish_message(&mut message);
        message
    }

    fn nest(parts: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, value) in parts {
            attribute(&mut bytes, *kind, |bytes| bytes.extend(value));
        }
        bytes
    }

    fn named(name: &str, data: Vec<u8>) -> (u16, Vec<u8>) {
        (1, nest(&[(1, [name.as_bytes(), b"\0"].concat()), (2, data)]))
    }

    fn answer(parts: &[(u16, Vec<u8>)]) -> Vec<u8> {
        [vec![2, 0, 0, 0], nest(parts)].concat()
    }

    fn verdict(code: i32, chain: &str) -> Vec<u8> {
        let verdict = nest(&[(1, code.to_be_bytes().to_vec()), (2, chain.as_bytes().to_vec())]);
        nest(&[(1, 0u32.to_be_bytes().to_vec()), (2, nest(&[(2, verdict)]))])
    }

    #[test]
    fn a_rule_shows_its_comments_jump_and_counter_whatever_else_is_in_it() {
        let mut comment = b"cali:wUHhoiAYhphO9Mso".to_vec();
        comment.resize(256, 0);
        let comment = nest(&[(1, b"comment\0".to_vec()), (2, vec![0; 4]), (3, comment)]);
        let counter = nest(&[(1, 9u64.to_be_bytes().to_vec()), (2, 7u64.to_be_bytes().to_vec())]);
        let rule_of = |expressions: &[(u16, Vec<u8>)], userdata: &[u8]| {
            rule(&answer(&[
                (1, b"filter\0".to_vec()),
                (2, b"FORWARD\0".to_vec()),
                (3, 6u64.to_be_bytes().to_vec()),
                (4, nest(expressions)),
                (7, userdata.to_vec()),
            ]))
            .unwrap()
        };
        let expected = NativeRule {
            table: "filter".into(),
            chain: "FORWARD".into(),
            handle: 6,
            comments: vec!["cali:wUHhoiAYhphO9Mso".into()],
            jump: Some("cali-FORWARD".into()),
            packets: Some(7),
            ..NativeRule::default()
        };
        let jump = named("immediate", verdict(JUMP, "cali-FORWARD"));
        let plain = [named("match", comment), named("counter", counter), jump.clone()];
        assert_eq!(rule_of(&plain, &[]), expected);
        assert_eq!(rule_of(&[&plain[..], &[named("hash", vec![])]].concat(), &[]), expected);
        let goto = rule_of(&[named("immediate", verdict(-4, "cali-FORWARD"))], &[]);
        assert_eq!(goto.jump, None);
        let set = nest(&[(1, b"set\0".to_vec()), (2, vec![0; 4]), (3, vec![0; 8])]);
        let ancient = rule_of(&[named("match", set), named("masq", vec![])], &[]);
        assert_eq!((ancient.matches_like_ancient, ancient.masquerades), (true, true));
        assert_eq!(rule_of(&[jump], b"\x01\x02xx\x00\x03abc").comments, ["abc".into()]);
    }

    #[test]
    fn a_malformed_answer_is_none() {
        assert_eq!(rule(&[2, 0]), None);
        assert_eq!(rule(&answer(&[(1, b"filter\0".to_vec())])), None);
        let mut cut = answer(&[(1, b"filter\0".to_vec()), (3, b"X\0".to_vec())]);
        assert!(chain(&cut).is_some());
        cut.truncate(cut.len() - 3);
        assert_eq!(chain(&cut), None);
        assert_eq!((table(&[]), generation(&[2, 0, 0, 0])), (None, None));
    }

    #[test]
    fn a_batch_is_framed_and_numbered() {
        let removals = [
            Removal::Rule { table: "filter".into(), chain: "FORWARD".into(), handle: 7 },
            Removal::Table { table: "calico".into() },
        ];
        let batch = removal_batch(Family::V4, &removals, 5);
        let mut rest = batch.as_slice();
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(*rest.first_chunk().unwrap()) as usize;
            let kind = u16::from_ne_bytes(*rest[4..].first_chunk().unwrap());
            seen.push((kind, u32::from_ne_bytes(*rest[8..].first_chunk().unwrap())));
            rest = &rest[length.next_multiple_of(4)..];
        }
        assert_eq!(seen, [(16, 5), (0x0a08, 6), (0x0a02, 7), (17, 8)]);
    }
}
