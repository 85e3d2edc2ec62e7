//! How large a table of the legacy iptables variant is, in a few microseconds; and whether it is still the same, in a
//! quarter of the time that a listing takes.
//!
//! The kernel tells it through the socket options that `iptables-legacy` itself asks (`IPT_SO_GET_INFO`,
//! `IPT_SO_GET_ENTRIES`). Two sizes that differ prove that somebody replaced the table; equal ones do not prove that
//! nobody did (performance.md 6.4). A [fingerprint](Asker::fingerprint) is over all bytes of all rules but their
//! counters.
//!
//! Invariant: this is the only place of the project with unsafe code, one call of `getsockopt`. `nix` can ask for
//! socket options only with buffers that it makes itself, and these options read the table's name out of the buffer.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h).
const GET_INFO: libc::c_int = 64;
/// `IPT_SO_GET_ENTRIES` and `IP6T_SO_GET_ENTRIES`.
const GET_ENTRIES: libc::c_int = 65;

/// Length of a table's name with the zero byte at its end.
const NAME: usize = 32;
/// Numbers in the answer: valid hooks, five entry points, five underflows, number of entries, size.
const NUMBERS: usize = 13;
const LENGTH: usize = NAME + NUMBERS * 4;

/// Where the rules begin in `struct ipt_get_entries`: behind the name and the size, aligned for their counters.
const ENTRIES: usize = (NAME + 4).next_multiple_of(align_of::<u64>());

/// Where things are in `struct ipt_entry` and `struct ip6t_entry`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// The distance to the next rule, two bytes.
    next: usize,
    /// Packets and bytes, eight each.
    counters: usize,
}

const COUNTERS: usize = 16;
const IPV4: Layout = Layout { next: 90, counters: 96 };
const IPV6: Layout = Layout { next: 142, counters: 148usize.next_multiple_of(align_of::<u64>()) };

/// What the kernel says about a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Which hooks the table has, where the rules of each begin and where its policy is, in bytes.
    pub hooks: [u32; NUMBERS - 2],
    /// Rules, chain heads, chain policies and the end of the table.
    pub entries: u32,
    /// Of all entries, in bytes.
    pub size: u32,
}

/// A socket to ask through.
#[derive(Debug)]
pub struct Asker {
    socket: OwnedFd,
    level: libc::c_int,
    layout: Layout,
}

impl Asker {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If the kernel has no sockets of the family.
    pub fn new(ipv6: bool) -> io::Result<Self> {
        let (family, level, layout) = if ipv6 {
            (AddressFamily::Inet6, libc::IPPROTO_IPV6, IPV6)
        } else {
            (AddressFamily::Inet, libc::IPPROTO_IP, IPV4)
        };
        let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, level, layout })
    }

    /// Asks for one table. The kernel **makes** a table that it does not have yet: ask only for tables that are listed
    /// in `/proc/net/ip_tables_names`.
    ///
    /// # Errors
    ///
    /// If the caller may not ask, there is no such table, or the kernel has no legacy tables at all.
    pub fn ask(&self, table: &str) -> io::Result<TableInfo> {
        let mut buffer = [0u8; LENGTH];
        write_name(&mut buffer, table)?;
        self.get(GET_INFO, &mut buffer)?;
        Ok(decode(&buffer))
    }

    /// Returns a number that stands for everything in the table but counters: as long as nobody replaces the table it
    /// is the same, and a table with other rules has, as good as certainly, another. Takes about a microsecond a rule.
    /// As with [`Self::ask`], the kernel makes a table that it does not have.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`], and if somebody replaces the table meanwhile.
    pub fn fingerprint(&self, table: &str) -> io::Result<u64> {
        let size = self.ask(table)?.size;
        let mut buffer = vec![0u8; ENTRIES + size as usize];
        write_name(&mut buffer, table)?;
        if let Some(place) = buffer.get_mut(NAME..).and_then(|rest| rest.first_chunk_mut()) {
            *place = size.to_ne_bytes();
        }
        self.get(GET_ENTRIES, &mut buffer)?;
        digest(buffer.get(ENTRIES..).unwrap_or_default(), self.layout)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's rules are laid out in another way"))
    }

    /// Asks for an option whose answer is as long as the buffer.
    fn get(&self, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
        let expected = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
        let mut length = expected;
        #[allow(unsafe_code, reason = "see the module's invariant")]
        // SAFETY: the descriptor is open as long as `self` lives; `buffer` is `length` bytes of initialised memory that
        // nobody else refers to during the call; the kernel reads and writes at most `length` bytes of it and writes
        // `length`; any bytes are valid contents of both.
        let status = unsafe {
            libc::getsockopt(self.socket.as_raw_fd(), self.level, option, buffer.as_mut_ptr().cast(), &raw mut length)
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        if length != expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel answered with another structure"));
        }
        Ok(())
    }
}

fn write_name(buffer: &mut [u8], table: &str) -> io::Result<()> {
    let name = table.as_bytes();
    if name.len() >= NAME {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of a table has at most 31 bytes"));
    }
    for (place, byte) in buffer.iter_mut().zip(name) {
        *place = *byte;
    }
    Ok(())
}

/// Mixes all entries without their counters; `None` if they do not follow each other to the end.
fn digest(mut entries: &[u8], layout: Layout) -> Option<u64> {
    let mut digest = entries.len() as u64;
    while !entries.is_empty() {
        let length = usize::from(u16::from_ne_bytes(*entries.get(layout.next..)?.first_chunk()?));
        if length < layout.counters + COUNTERS {
            return None;
        }
        let (entry, rest) = entries.split_at_checked(length)?;
        digest = mix(digest, entry.get(..layout.counters)?);
        digest = mix(digest, entry.get(layout.counters + COUNTERS..)?);
        entries = rest;
    }
    Some(digest)
}

/// Eight bytes at a time, each with a multiplication whose two halves are folded onto each other.
fn mix(mut digest: u64, bytes: &[u8]) -> u64 {
    const ODD: u128 = 0x9e37_79b9_7f4a_7c15;
    let mut take = |word: u64| {
        // Added to, so that no word can bring it to nought for good.
        let product = u128::from(digest.wrapping_add(1) ^ word) * ODD;
        let bytes = product.to_ne_bytes();
        let half =
            |at: usize| bytes.get(at..).and_then(|half| half.first_chunk()).map_or(0, |half| u64::from_ne_bytes(*half));
        digest = digest.rotate_left(23).wrapping_add(half(0) ^ half(8));
    };
    let words = bytes.chunks_exact(8);
    let mut rest = [0; 8];
    for (place, byte) in rest.iter_mut().zip(words.remainder()) {
        *place = *byte;
    }
    words.for_each(|word| take(word.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word))));
    take(u64::from_ne_bytes(rest));
    digest
}

fn decode(buffer: &[u8; LENGTH]) -> TableInfo {
    let mut numbers = buffer
        .get(NAME..)
        .unwrap_or_default()
        .chunks_exact(4)
        .map(|bytes| bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)));
    let hooks = std::array::from_fn(|_| numbers.next().unwrap_or_default());
    TableInfo { hooks, entries: numbers.next().unwrap_or_default(), size: numbers.next().unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    fn restore(family: &str, input: &str) {
        let mut child =
            Command::new(format!("{family}-legacy-restore")).arg("--noflush").stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{input}");
    }

    #[test]
    fn numbers_are_taken_from_behind_the_name() {
        let mut buffer = [0xff; LENGTH];
        for number in 0..NUMBERS as u32 {
            let at = NAME + number as usize * 4;
            buffer[at..at + 4].copy_from_slice(&number.to_ne_bytes());
        }
        let info = decode(&buffer);
        assert_eq!(info, TableInfo { hooks: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], entries: 11, size: 12 });
    }

    #[test]
    fn a_rule_more_is_an_entry_more_and_a_replaced_table_is_seen() {
        testkit::kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore");
        for (family, ipv6) in [("iptables", false), ("ip6tables", true)] {
            testkit::netns::in_new_netns(|| {
                restore(family, "*filter\n:a - -\n-A FORWARD -j a\nCOMMIT\n");
                let asker = Asker::new(ipv6).unwrap();
                let before = asker.ask("filter").unwrap();
                // Three policies, the rule, head and end of the chain, and the end of the table.
                assert_eq!(before.entries, 7);
                assert_eq!(asker.ask("filter").unwrap(), before);
                restore(family, "*filter\n-A a -p 6 -j DROP\nCOMMIT\n");
                let after = asker.ask("filter").unwrap();
                assert_eq!(after.entries, 8);
                assert!(after.size > before.size, "{before:?} {after:?}");
            });
        }
    }

    #[test]
    fn a_fingerprint_tells_tables_of_one_size_apart_and_does_not_count_packets() {
        testkit::kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore");
        for (family, ipv6) in [("iptables", false), ("ip6tables", true)] {
            testkit::netns::in_new_netns(|| {
                let rule =
                    |number: u32| format!("-m comment --comment \"number {number}\" -j MARK --set-mark {number}");
                let rules = |numbers: &[u32]| {
                    let lines = numbers.iter().map(|number| format!("-A a {}\n", rule(*number)));
                    format!("*filter\n:a - -\n-A OUTPUT -j a\n{}COMMIT\n", lines.collect::<String>())
                };
                restore(family, &rules(&[1, 2, 3]));
                let asker = Asker::new(ipv6).unwrap();
                let (info, print) = (asker.ask("filter").unwrap(), asker.fingerprint("filter").unwrap());
                // Counters, and nothing else.
                restore(family, "*filter\n-Z\nCOMMIT\n");
                Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
                let address = if ipv6 { "::1" } else { "127.0.0.1" };
                let sender = std::net::UdpSocket::bind((address, 0)).unwrap();
                sender.send_to(b"x", (address, 9)).unwrap();
                let listed = Command::new(format!("{family}-legacy")).args(["-nvL", "OUTPUT"]).output().unwrap();
                let listed = String::from_utf8_lossy(&listed.stdout);
                assert!(listed.contains("OUTPUT (policy ACCEPT ") && !listed.contains("ACCEPT 0 packets"), "{listed}");
                assert_eq!(asker.fingerprint("filter").unwrap(), print);
                for (number, other) in [(1, 3), (2, 4), (3, 2)] {
                    restore(family, &format!("*filter\n-R a {number} {}\nCOMMIT\n", rule(other)));
                    assert_eq!(asker.ask("filter").unwrap(), info);
                    assert_ne!(asker.fingerprint("filter").unwrap(), print);
                    restore(family, &format!("*filter\n-R a {number} {}\nCOMMIT\n", rule(number)));
                    assert_eq!(asker.fingerprint("filter").unwrap(), print, "the same rules again");
                }
            });
        }
    }

    #[test]
    fn entries_that_do_not_follow_each_other_have_no_digest() {
        let entry = |length: u16| {
            let mut entry = vec![0; usize::from(length)];
            entry[IPV4.next..IPV4.next + 2].copy_from_slice(&length.to_ne_bytes());
            entry
        };
        let two = [entry(112), entry(152)].concat();
        let digest_of = |bytes: &[u8]| digest(bytes, IPV4);
        assert!(digest_of(&two).is_some());
        assert_eq!(digest_of(&two[..two.len() - 1]), None);
        assert_eq!(digest_of(&[0; 112]), None, "a step of nothing");
        for (at, counts) in [(0, true), (95, true), (96, false), (111, false), (112, true), (263, true)] {
            let mut other = two.clone();
            other[at] ^= 4;
            assert_eq!(digest_of(&other) != digest_of(&two), counts, "{at}");
        }
        assert_ne!(mix(7, &[1, 0]), mix(7, &[0, 1]));
        assert_ne!(mix(7, &[0; 8]), mix(7, &[0; 16]));
    }

    #[test]
    fn a_name_that_is_too_long_is_not_asked_for() {
        let asker = Asker::new(false).unwrap();
        for asked in [asker.ask(&"x".repeat(NAME)).map(drop), asker.fingerprint(&"x".repeat(NAME)).map(drop)] {
            assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
