//! Messages of the kernel's set subsystem: bytes out, values in (crates.md 6.3).
//!
//! Used by the netlink transport; knows nothing of sockets. Numbers come from
//! `include/uapi/linux/netfilter/ipset/ip_set.h`.
//!
//! Invariant: reading never panics, whatever the bytes; what cannot be understood is reported as such.

use std::net::IpAddr;

use ipnet::IpNet;
use model::Family;
use program::{Member, SetKind};

use crate::netlink::{
    HEADER_LENGTH, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, attributes, finish_message, start_message,
};

/// `NETLINK_NETFILTER`.
pub(crate) const NETLINK_NETFILTER: isize = 12;
/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u16 = 6;
/// Spoken by every kernel since 2.6.39, also by those that speak 7 (crates.md I1).
pub(crate) const PROTOCOL: u8 = 6;
/// One message's element list must stay below 65,535 bytes; larger than this is no faster (I8).
const LIST_BYTES: usize = 16_000;

/// `struct nfgenmsg`.
const GENERIC_LENGTH: usize = 4;
const NESTED: u16 = 0x8000;
const NETWORK_ORDER: u16 = 0x4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Protocol = 1,
    Create = 2,
    Destroy = 3,
    Swap = 6,
    List = 7,
    Add = 9,
    Del = 10,
    Type = 13,
}

mod attribute {
    pub(super) const PROTOCOL: u16 = 1;
    pub(super) const SETNAME: u16 = 2;
    pub(super) const TYPENAME: u16 = 3;
    /// In a swap this number is the second set's name.
    pub(super) const SETNAME2: u16 = 3;
    pub(super) const REVISION: u16 = 4;
    pub(super) const FAMILY: u16 = 5;
    pub(super) const FLAGS: u16 = 6;
    pub(super) const DATA: u16 = 7;
    pub(super) const ELEMENTS: u16 = 8;
    pub(super) const LINENO: u16 = 9;
    pub(super) const REVISION_MIN: u16 = 10;
}

mod data {
    pub(super) const IP: u16 = 1;
    pub(super) const IP_TO: u16 = 2;
    pub(super) const CIDR: u16 = 3;
    pub(super) const PORT: u16 = 4;
    pub(super) const PORT_TO: u16 = 5;
    pub(super) const TIMEOUT: u16 = 6;
    pub(super) const PROTO: u16 = 7;
    pub(super) const FLAGS: u16 = 8;
    pub(super) const LINENO: u16 = 9;
    // Of a set, not of a member:
    pub(super) const HASHSIZE: u16 = 18;
    pub(super) const MAXELEM: u16 = 19;
    pub(super) const NETMASK: u16 = 20;
    pub(super) const BITMASK: u16 = 12;
    pub(super) const ELEMENTS: u16 = 24;
}

/// `IPSET_FLAG_LIST_SETNAME`.
const LIST_NAMES: u32 = 2;
/// `IPSET_FLAG_LIST_HEADER`.
const LIST_HEADERS: u32 = 4;
/// `IPSET_FLAG_NOMATCH`: the member is an exception, not a member.
const FLAG_NOMATCH: u32 = 4;
/// `IPSET_FLAG_WITH_FORCEADD`: a full set throws members out.
const FLAG_FORCEADD: u32 = 32;

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// Returns the kernel's name of a type.
pub(crate) const fn type_name(kind: SetKind) -> &'static str {
    match kind {
        SetKind::Address => "hash:ip",
        SetKind::Net => "hash:net",
        SetKind::AddressPort => "hash:ip,port",
    }
}

/// Returns the highest revision of a type that this program knows.
pub(crate) const fn highest_revision(kind: SetKind) -> u8 {
    match kind {
        SetKind::Address => 6,
        SetKind::Net | SetKind::AddressPort => 7,
    }
}

// === requests ===

/// Writes requests into a buffer that is kept between them.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

/// What a set is created with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Creation<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: SetKind,
    pub(crate) revision: u8,
    pub(crate) family: Family,
    pub(crate) max_members: u32,
    pub(crate) hash_size: u32,
}

impl Encoder {
    /// The request that was written last.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Asks which versions of the protocol the kernel speaks.
    pub(crate) fn protocol(&mut self, sequence: u32) -> &[u8] {
        self.start(Command::Protocol, NLM_F_REQUEST | NLM_F_ACK, sequence);
        self.finish()
    }

    /// Asks for the revisions of a type.
    pub(crate) fn revisions(&mut self, kind: SetKind, family: Family, sequence: u32) -> &[u8] {
        self.start(Command::Type, NLM_F_REQUEST | NLM_F_ACK, sequence);
        self.text(attribute::TYPENAME, type_name(kind));
        self.byte(attribute::FAMILY, family_number(family));
        self.finish()
    }

    /// `flags` are added to request and acknowledgement: with `NLM_F_EXCL` an existing set is an error.
    pub(crate) fn create(&mut self, set: Creation<'_>, flags: u16, sequence: u32) -> &[u8] {
        self.start(Command::Create, NLM_F_REQUEST | NLM_F_ACK | flags, sequence);
        self.text(attribute::SETNAME, set.name);
        self.text(attribute::TYPENAME, type_name(set.kind));
        self.byte(attribute::REVISION, set.revision);
        self.byte(attribute::FAMILY, family_number(set.family));
        let nest = self.open(attribute::DATA);
        self.word(data::MAXELEM, set.max_members);
        self.word(data::HASHSIZE, set.hash_size);
        self.close(nest);
        self.finish()
    }

    pub(crate) fn destroy(&mut self, name: &str, sequence: u32) -> &[u8] {
        self.start(Command::Destroy, NLM_F_REQUEST | NLM_F_ACK, sequence);
        // Without a name this would destroy all sets.
        self.text(attribute::SETNAME, name);
        self.finish()
    }

    pub(crate) fn swap(&mut self, first: &str, second: &str, sequence: u32) -> &[u8] {
        self.start(Command::Swap, NLM_F_REQUEST | NLM_F_ACK, sequence);
        self.text(attribute::SETNAME, first);
        self.text(attribute::SETNAME2, second);
        self.finish()
    }

    /// Asks for the names of all sets.
    pub(crate) fn list_names(&mut self, sequence: u32) -> &[u8] {
        self.start(Command::List, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.word(attribute::FLAGS, LIST_NAMES);
        self.finish()
    }

    /// Asks for all sets without their members.
    pub(crate) fn list_headers(&mut self, sequence: u32) -> &[u8] {
        self.start(Command::List, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.word(attribute::FLAGS, LIST_HEADERS);
        self.finish()
    }

    /// Asks for all sets with all members.
    pub(crate) fn list_all(&mut self, sequence: u32) -> &[u8] {
        self.start(Command::List, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.finish()
    }

    /// Asks for one set with all members.
    pub(crate) fn list(&mut self, name: &str, sequence: u32) -> &[u8] {
        self.start(Command::List, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.text(attribute::SETNAME, name);
        self.finish()
    }

    /// Adds or removes as many members as fit into one message; returns the message and how many.
    /// Members that are already there, or already gone, are fine unless `strict` asks for an error (I3).
    pub(crate) fn members(
        &mut self,
        command: Command,
        name: &str,
        members: impl IntoIterator<Item = Member>,
        strict: bool,
        sequence: u32,
    ) -> (&[u8], usize) {
        let strict = if strict { NLM_F_EXCL } else { 0 };
        self.start(command, NLM_F_REQUEST | NLM_F_ACK | strict, sequence);
        self.text(attribute::SETNAME, name);
        // The kernel fills this in when a member fails.
        self.attribute(attribute::LINENO, &0u32.to_ne_bytes());
        let list = self.open(attribute::ELEMENTS);
        let mut count = 0;
        for (line, member) in (1u32..).zip(members) {
            if self.bytes.len() - list > LIST_BYTES {
                break;
            }
            let element = self.open(attribute::DATA);
            self.element(&member);
            self.attribute(data::LINENO, &line.to_ne_bytes());
            self.close(element);
            count += 1;
        }
        self.close(list);
        (self.finish(), count)
    }

    fn element(&mut self, member: &Member) {
        match member {
            Member::Address(address) => self.address(*address),
            Member::Net(net) => {
                self.address(net.addr());
                self.byte(data::CIDR, net.prefix_len());
            }
            Member::AddressPort { address, protocol, port } => {
                self.address(*address);
                self.attribute(data::PORT | NETWORK_ORDER, &port.to_be_bytes());
                self.byte(data::PROTO, *protocol);
            }
        }
    }

    fn address(&mut self, address: IpAddr) {
        let nest = self.open(data::IP);
        match address {
            IpAddr::V4(v4) => self.attribute(1 | NETWORK_ORDER, &v4.octets()),
            IpAddr::V6(v6) => self.attribute(2 | NETWORK_ORDER, &v6.octets()),
        }
        self.close(nest);
    }

    fn start(&mut self, command: Command, flags: u16, sequence: u32) {
        start_message(&mut self.bytes, (SUBSYSTEM << 8) | command as u16, flags, sequence);
        self.bytes.extend([family_number(Family::V4), 0, 0, 0]);
        self.byte(attribute::PROTOCOL, PROTOCOL);
    }

    fn finish(&mut self) -> &[u8] {
        finish_message(&mut self.bytes);
        &self.bytes
    }

    fn byte(&mut self, kind: u16, value: u8) {
        self.attribute(kind, &[value]);
    }

    fn word(&mut self, kind: u16, value: u32) {
        self.attribute(kind | NETWORK_ORDER, &value.to_be_bytes());
    }

    fn text(&mut self, kind: u16, value: &str) {
        let start = self.open_plain(kind);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
        self.close(start);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.open_plain(kind);
        self.bytes.extend(value);
        self.close(start);
    }

    fn open(&mut self, kind: u16) -> usize {
        self.open_plain(kind | NESTED)
    }

    fn open_plain(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        start
    }

    /// Writes the length of the attribute that began at `start`, and fills up to a multiple of four.
    fn close(&mut self, start: usize) {
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(field) = self.bytes.get_mut(start..).and_then(<[u8]>::first_chunk_mut) {
            *field = length.to_ne_bytes();
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

// === answers ===

/// What a dump says about a set itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) type_name: String,
    pub(crate) family: Option<Family>,
    pub(crate) max_members: Option<u32>,
    /// Has an option that changes what it matches or keeps: time limit, netmask, forced addition.
    pub(crate) special: bool,
    /// How many members it has, if the kernel says so.
    pub(crate) count: Option<u32>,
}

/// Part of a set, as one message of a dump carries it.
#[derive(Debug, Default)]
pub(crate) struct Part {
    pub(crate) name: Option<String>,
    pub(crate) header: Option<Header>,
    pub(crate) members: Vec<Member>,
    /// Members of a form that this program never writes: exceptions, with a time limit, ranges.
    pub(crate) odd_members: u64,
}

/// Reads one message of a dump, from after its header. Returns `None` if it is malformed. Of sets whose names
/// `ours` does not know only the name is read: they may be of any type and revision (users.md U3.a).
pub(crate) fn part(payload: &[u8], ours: impl Fn(&str) -> bool) -> Option<Part> {
    let mut part = Part::default();
    let mut header = Header::default();
    let mut has_header = false;
    for attribute in attributes(payload.get(GENERIC_LENGTH..)?) {
        let (kind, value) = attribute?;
        match kind {
            attribute::SETNAME => {
                let name = text(value);
                let known = ours(&name);
                part.name = Some(name);
                if !known {
                    return Some(part);
                }
            }
            attribute::TYPENAME => {
                header.type_name = text(value);
                has_header = true;
            }
            attribute::FAMILY => {
                header.family = match *value.first()? {
                    2 => Some(Family::V4),
                    10 => Some(Family::V6),
                    _ => None,
                }
            }
            attribute::DATA => {
                for attribute in attributes(value) {
                    match attribute? {
                        (data::MAXELEM, value) => header.max_members = Some(word(value)?),
                        (data::ELEMENTS, value) => header.count = Some(word(value)?),
                        (data::TIMEOUT | data::NETMASK | data::BITMASK, _) => header.special = true,
                        (data::FLAGS, value) => header.special |= word(value)? & FLAG_FORCEADD != 0,
                        _ => (),
                    }
                }
            }
            attribute::ELEMENTS => {
                for attribute in attributes(value) {
                    let (_, value) = attribute?;
                    match member(value) {
                        Some(member) => part.members.push(member),
                        None => part.odd_members += 1,
                    }
                }
            }
            _ => (),
        }
    }
    part.header = has_header.then_some(header);
    Some(part)
}

/// Reads the answer about a type: lowest and highest revision.
pub(crate) fn revisions(payload: &[u8]) -> Option<(u8, u8)> {
    let mut highest = None;
    let mut lowest = None;
    for attribute in attributes(payload.get(GENERIC_LENGTH..)?) {
        match attribute? {
            (attribute::REVISION, value) => highest = value.first().copied(),
            (attribute::REVISION_MIN, value) => lowest = value.first().copied(),
            _ => (),
        }
    }
    highest.map(|highest| (lowest.unwrap_or(highest), highest))
}

/// Reads the answer about the protocol: lowest and highest version.
pub(crate) fn protocols(payload: &[u8]) -> Option<(u8, u8)> {
    let mut highest = None;
    let mut lowest = None;
    for attribute in attributes(payload.get(GENERIC_LENGTH..)?) {
        match attribute? {
            (attribute::PROTOCOL, value) => highest = value.first().copied(),
            // PROTOCOL_MIN has the number of REVISION_MIN.
            (attribute::REVISION_MIN, value) => lowest = value.first().copied(),
            _ => (),
        }
    }
    highest.map(|highest| (lowest.unwrap_or(highest), highest))
}

/// Reads the number of the failing member, from 1, out of the request that comes back with an error (I4).
pub(crate) fn failed_line(request: &[u8]) -> Option<usize> {
    for attribute in attributes(request.get(HEADER_LENGTH + GENERIC_LENGTH..)?) {
        if let (attribute::LINENO, value) = attribute? {
            return Some(u32::from_ne_bytes(*value.first_chunk()?) as usize);
        }
    }
    None
}

fn member(bytes: &[u8]) -> Option<Member> {
    let (mut address, mut length, mut port, mut protocol) = (None, None, None, None);
    for attribute in attributes(bytes) {
        match attribute? {
            (data::IP, value) => address = Some(self::address(value)?),
            (data::CIDR, value) => length = Some(*value.first()?),
            (data::PORT, value) => port = Some(u16::from_be_bytes(*value.first_chunk()?)),
            (data::PROTO, value) => protocol = Some(*value.first()?),
            (data::FLAGS, value) if word(value)? & FLAG_NOMATCH != 0 => return None,
            (data::IP_TO | data::PORT_TO | data::TIMEOUT, _) => return None,
            // Counters, comments and the like change nothing about what is matched.
            _ => (),
        }
    }
    let address = address?;
    match (length, port, protocol) {
        (None, None, None) => Some(Member::Address(address)),
        (Some(length), None, None) => IpNet::new(address, length).ok().map(Member::Net),
        (None, Some(port), Some(protocol)) => Some(Member::AddressPort { address, protocol, port }),
        _ => None,
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match attributes(bytes).next()?? {
        (1, value) => Some(IpAddr::from(*value.first_chunk::<4>()?)),
        (2, value) => Some(IpAddr::from(*value.first_chunk::<16>()?)),
        _ => None,
    }
}

fn word(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Names of others' sets are any bytes; none of ours has any that is replaced here.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::NLM_F_CREATE;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_create_request_has_the_bytes_that_the_kernel_accepted() {
        let set = Creation {
            name: "cali40x",
            kind: SetKind::Address,
            revision: 6,
            family: Family::V4,
            max_members: 65_536,
            hash_size: 1024,
        };
        let expected = hex("58000000 0206 0506 03000000 00000000 02000000 0500 0100 06000000
            0c00 0200 63616c6934307800  0c00 0300 686173683a697000  0500 0400 06000000  0500 0500 02000000
            1400 0780  0800 1340 00010000  0800 1240 00000400");
        // The attribute's value is big endian: 65,536 is 00 01 00 00.
        assert_eq!(Encoder::default().create(set, NLM_F_CREATE | NLM_F_EXCL, 3), expected);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn two_members_in_one_message_have_the_bytes_that_the_kernel_accepted() {
        let members = ["10.0.0.1", "10.0.0.2"].map(|text| Member::Address(text.parse().unwrap()));
        let mut encoder = Encoder::default();
        let (bytes, count) = encoder.members(Command::Add, "cali40x", members, false, 4);
        let mut expected = hex("64000000 0906 0502 04000000 00000000 02000000 0500 0100 06000000
            0c00 0200 63616c6934307800  0800 0900 00000000
            3400 0880
              1800 0780  0c00 0180 0800 0140 0a000001  0800 0900 01000000
              1800 0780  0c00 0180 0800 0140 0a000002  0800 0900 02000000");
        // The worked example asks for an error if a member is there; this program does not.
        expected[7] = 0;
        assert_eq!((bytes, count), (expected.as_slice(), 2));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let members = [
            Member::Address("10.0.0.1".parse().unwrap()),
            Member::Address("fd00::1".parse().unwrap()),
            Member::Net("10.0.0.0/8".parse().unwrap()),
            Member::Net("10.1.2.3/32".parse().unwrap()),
            Member::Net("fd00::/64".parse().unwrap()),
            Member::AddressPort { address: "10.0.0.1".parse().unwrap(), protocol: 132, port: 65535 },
            Member::AddressPort { address: "fd00::1".parse().unwrap(), protocol: 6, port: 80 },
        ];
        let mut encoder = Encoder::default();
        let (bytes, count) = encoder.members(Command::Add, "x", members.iter().copied(), false, 1);
        assert_eq!(count, members.len());
        let part = part(&bytes[HEADER_LENGTH..], |_| true).unwrap();
        assert_eq!((part.name.as_deref(), part.members.as_slice()), (Some("x"), members.as_slice()));
        assert!(part.header.is_none() && part.odd_members == 0);
    }

    #[test]
    fn a_long_list_is_cut_at_sixteen_thousand_bytes() {
        let members: Vec<Member> = (0..100_000u32).map(|n| Member::Address(IpAddr::from(n.to_be_bytes()))).collect();
        let mut encoder = Encoder::default();
        let (bytes, count) = encoder.members(Command::Add, "x", members.iter().copied(), false, 1);
        assert!(bytes.len() < 16_100 && count == 667, "{} {count}", bytes.len());
    }

    #[test]
    fn exceptions_and_members_that_expire_are_odd() {
        let mut encoder = Encoder::default();
        for (kind, value) in [(data::FLAGS, 4), (data::TIMEOUT, 30)] {
            encoder.start(Command::List, 0, 1);
            let list = encoder.open(attribute::ELEMENTS);
            let element = encoder.open(attribute::DATA);
            encoder.element(&Member::Net("10.0.0.0/8".parse().unwrap()));
            encoder.word(kind, value);
            encoder.close(element);
            encoder.close(list);
            let part = part(&encoder.finish()[HEADER_LENGTH..], |_| true).unwrap();
            assert_eq!((part.members.len(), part.odd_members), (0, 1));
        }
    }

    #[test]
    fn of_others_sets_only_the_name_is_read_whatever_its_bytes() {
        let mut encoder = Encoder::default();
        encoder.start(Command::List, 0, 1);
        encoder.attribute(attribute::SETNAME, b"caf\xe9\0");
        encoder.attribute(attribute::DATA, &[1]);
        let payload = encoder.finish()[HEADER_LENGTH..].to_vec();
        let part = super::part(&payload, |name| name.starts_with("cali")).unwrap();
        assert_eq!((part.name.as_deref(), part.header), (Some("caf\u{fffd}"), None));
    }

    #[test]
    fn malformed_answers_are_refused_without_panic() {
        let member = Member::AddressPort { address: "fd00::1".parse().unwrap(), protocol: 6, port: 80 };
        let mut encoder = Encoder::default();
        let whole = encoder.members(Command::Add, "x", [member], false, 1).0[HEADER_LENGTH..].to_vec();
        for cut in 0..whole.len() {
            let _ = (
                part(&whole[..cut], |_| true),
                revisions(&whole[..cut]),
                protocols(&whole[..cut]),
                failed_line(&whole[..cut]),
            );
            let mut damaged = whole.clone();
            for value in [0, 1, 3, 0x7f, 0xff] {
                damaged[cut] = value;
                let _ = (part(&damaged, |_| true), revisions(&damaged), failed_line(&damaged));
            }
        }
        assert!(part(&[2, 0, 0, 0, 9, 0, 1, 0], |_| true).is_none());
    }
}
