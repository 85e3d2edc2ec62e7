//! Messages of the kernel's connection tracking: bytes out, flows in.
//!
//! Used by the walk; knows nothing of sockets. Numbers come from
//! `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.
//!
//! Invariant: reading never panics, whatever the bytes; what cannot be understood is no flow of ours.

use std::collections::BTreeSet;
use std::net::IpAddr;

use model::Family;
use nix::libc;

use crate::netlink::{HEADER_LENGTH, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, attributes, finish_message, start_message};

/// `NETLINK_NETFILTER`.
pub(super) const NETLINK_NETFILTER: isize = 12;
/// `NFNL_SUBSYS_CTNETLINK`, in the upper byte of a message's kind.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

/// `struct nfgenmsg`.
const GENERIC_LENGTH: usize = 4;
const NESTED: u16 = 0x8000;

mod attribute {
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    /// In a tuple.
    pub(super) const TUPLE_IP: u16 = 1;
}

/// Addresses to look for, in the order of their bytes.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    v4: Vec<[u8; 4]>,
    v6: Vec<[u8; 16]>,
}

impl Addresses {
    pub(super) fn new(addresses: &BTreeSet<IpAddr>) -> Self {
        let mut all = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(address) => all.v4.push(address.octets()),
                IpAddr::V6(address) => all.v6.push(address.octets()),
            }
        }
        all.v4.sort_unstable();
        all.v6.sort_unstable();
        all
    }

    /// The family that all are of; `None` if there are both.
    fn family(&self) -> Option<Family> {
        match (self.v4.is_empty(), self.v6.is_empty()) {
            (false, true) => Some(Family::V4),
            (true, false) => Some(Family::V6),
            _ => None,
        }
    }

    fn contain(&self, address: &[u8]) -> bool {
        match address.len() {
            4 => self.v4.binary_search_by(|one| one.as_slice().cmp(address)).is_ok(),
            16 => self.v6.binary_search_by(|one| one.as_slice().cmp(address)).is_ok(),
            _ => false,
        }
    }
}

/// What identifies one flow, as the kernel wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    family: u8,
    original: Vec<u8>,
    zone: Option<Vec<u8>>,
    id: Option<Vec<u8>>,
}

/// Asks for all flows of the family of these addresses, or of both.
pub(super) fn list(addresses: &Addresses, sequence: u32) -> Vec<u8> {
    let family = match addresses.family() {
        Some(Family::V4) => libc::AF_INET,
        Some(Family::V6) => libc::AF_INET6,
        None => libc::AF_UNSPEC,
    };
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + GENERIC_LENGTH);
    start(&mut bytes, GET, NLM_F_REQUEST | NLM_F_DUMP, u8::try_from(family).unwrap_or(0), sequence);
    finish_message(&mut bytes);
    bytes
}

/// Appends the message that removes exactly this flow: its tuple could belong to another one by now, the id
/// does not.
pub(super) fn delete(flow: &Flow, sequence: u32, out: &mut Vec<u8>) {
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + GENERIC_LENGTH + flow.original.len() + 24);
    start(&mut bytes, DELETE, NLM_F_REQUEST | NLM_F_ACK, flow.family, sequence);
    put(&mut bytes, attribute::TUPLE_ORIG | NESTED, &flow.original);
    for (kind, value) in [(attribute::ZONE, &flow.zone), (attribute::ID, &flow.id)] {
        if let Some(value) = value {
            put(&mut bytes, kind, value);
        }
    }
    finish_message(&mut bytes);
    out.extend(bytes);
}

/// Reads one entry of a list; `None` unless it names one of the addresses, in either direction and before or
/// after translation.
pub(super) fn flow_of(addresses: &Addresses, payload: &[u8]) -> Option<Flow> {
    let family = *payload.first()?;
    let (mut original, mut zone, mut id) = (None, None, None);
    let mut theirs = false;
    for attribute in attributes(payload.get(GENERIC_LENGTH..)?) {
        let (kind, value) = attribute?;
        match kind {
            attribute::TUPLE_ORIG => {
                theirs |= names(addresses, value);
                original = Some(value);
            }
            attribute::TUPLE_REPLY => {
                theirs |= names(addresses, value);
                // Both tuples come first; most flows end here.
                if !theirs {
                    return None;
                }
            }
            attribute::ZONE => zone = Some(value.to_vec()),
            attribute::ID => id = Some(value.to_vec()),
            _ => (),
        }
    }
    theirs.then_some(Flow { family, original: original?.to_vec(), zone, id })
}

fn names(addresses: &Addresses, tuple: &[u8]) -> bool {
    let ip = attributes(tuple).flatten().find(|(kind, _)| *kind == attribute::TUPLE_IP);
    // Source and destination; there is nothing else in it.
    ip.is_some_and(|(_, ip)| attributes(ip).flatten().any(|(_, address)| addresses.contain(address)))
}

fn start(bytes: &mut Vec<u8>, kind: u16, flags: u16, family: u8, sequence: u32) {
    start_message(bytes, kind, flags, sequence);
    bytes.extend([family, 0, 0, 0]);
}

fn put(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, kind | NESTED, &parts.concat());
        bytes
    }

    fn plain(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, kind, value);
        bytes
    }

    fn octets(text: &str) -> Vec<u8> {
        match text.parse().unwrap() {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        }
    }

    fn tuple(kind: u16, source: &str, destination: &str) -> Vec<u8> {
        let first = if source.contains(':') { 3 } else { 1 };
        let ip = nested(1, &[plain(first, &octets(source)), plain(first + 1, &octets(destination))]);
        let proto = nested(2, &[plain(1, &[17]), plain(2, &[0, 7]), plain(3, &[0, 53])]);
        nested(kind, &[ip, proto])
    }

    fn entry(original: [&str; 2], reply: [&str; 2]) -> Vec<u8> {
        let family = if original[0].contains(':') { 10 } else { 2 };
        let mut bytes = vec![family, 0, 0, 0];
        bytes.extend(tuple(1, original[0], original[1]));
        bytes.extend(tuple(2, reply[0], reply[1]));
        bytes.extend(plain(3, &[0, 0, 0, 8]));
        bytes.extend(plain(12, &[1, 2, 3, 4]));
        bytes.extend(plain(18, &[0, 9]));
        bytes
    }

    fn addresses(text: &str) -> Addresses {
        Addresses::new(&text.split_whitespace().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn a_flow_belongs_to_whoever_began_it_or_answered_it_before_or_after_translation() {
        let cases = [
            ("10.65.0.2", ["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "10.65.0.2"], true),
            ("10.65.0.2", ["8.8.8.8", "10.65.0.2"], ["10.65.0.2", "8.8.8.8"], true),
            // A floating IP, and what is behind it.
            ("10.65.0.2", ["8.8.8.8", "192.0.2.1"], ["10.65.0.2", "8.8.8.8"], true),
            ("192.0.2.1", ["8.8.8.8", "192.0.2.1"], ["10.65.0.2", "8.8.8.8"], true),
            ("192.0.2.1", ["10.65.0.2", "10.65.0.2"], ["10.65.0.2", "192.0.2.1"], true),
            ("10.65.0.3", ["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "10.65.0.2"], false),
            ("fd10::2", ["fd10::2", "fd10::3"], ["fd10::3", "fd10::2"], true),
            ("fd10::2 10.65.0.1", ["fd10::3", "fd10::2"], ["fd10::2", "fd10::3"], true),
            ("fd10::4 10.65.0.2", ["fd10::3", "fd10::2"], ["fd10::2", "fd10::3"], false),
        ];
        for (wanted, original, reply, expected) in cases {
            let found = flow_of(&addresses(wanted), &entry(original, reply));
            assert_eq!(found.is_some(), expected, "{wanted}: {original:?} {reply:?}");
        }
    }

    #[test]
    fn a_flow_is_removed_by_what_the_kernel_called_it() {
        let payload = entry(["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "10.65.0.2"]);
        let flow = flow_of(&addresses("10.65.0.2"), &payload).unwrap();
        let mut message = Vec::new();
        delete(&flow, 7, &mut message);
        assert_eq!(message.len(), u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize);
        assert_eq!(message[4..8], [2, 1, 5, 0], "kind and flags");
        let parts: Vec<_> = attributes(&message[20..]).map(Option::unwrap).collect();
        let original = &tuple(1, "10.65.0.2", "8.8.8.8")[4..];
        assert_eq!(parts, [(1, original), (18, &[0, 9][..]), (12, &[1, 2, 3, 4])]);
    }

    #[test]
    fn the_list_is_of_the_family_that_is_asked_for() {
        for (wanted, family) in [("10.65.0.2", 2), ("fd10::2", 10), ("10.65.0.2 fd10::2", 0)] {
            assert_eq!(list(&addresses(wanted), 1)[16], family, "{wanted}");
        }
    }

    #[test]
    fn cut_entries_are_no_flows_and_do_no_harm() {
        let payload = entry(["10.65.0.2", "8.8.8.8"], ["8.8.8.8", "10.65.0.2"]);
        let tuples = 4 + 2 * tuple(1, "10.65.0.2", "8.8.8.8").len();
        for cut in 0..payload.len() {
            let found = flow_of(&addresses("10.65.0.2"), &payload[..cut]);
            assert!(cut >= tuples || found.is_none() || cut > tuples / 2, "{cut}");
        }
    }
}
