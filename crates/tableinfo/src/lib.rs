//! How large a table of the legacy iptables variant is, in a few microseconds.
//!
//! The kernel tells it through the socket option that `iptables-legacy` itself asks first (`IPT_SO_GET_INFO`). Two
//! answers that differ prove that somebody replaced the table; equal ones do not prove that nobody did
//! (performance.md 6.4).
//!
//! Invariant: this is the only place of the project with unsafe code, one call of `getsockopt` with a buffer on the
//! stack. `nix` can ask for socket options only with buffers that it makes itself, and this option reads the table's
//! name out of the buffer.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h).
const GET_INFO: libc::c_int = 64;

/// Length of a table's name with the zero byte at its end.
const NAME: usize = 32;
/// Numbers in the answer: valid hooks, five entry points, five underflows, number of entries, size.
const NUMBERS: usize = 13;
const LENGTH: usize = NAME + NUMBERS * 4;

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
}

impl Asker {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If the kernel has no sockets of the family.
    pub fn new(ipv6: bool) -> io::Result<Self> {
        let (family, level) =
            if ipv6 { (AddressFamily::Inet6, libc::IPPROTO_IPV6) } else { (AddressFamily::Inet, libc::IPPROTO_IP) };
        let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, level })
    }

    /// Asks for one table. The kernel **makes** a table that it does not have yet: ask only for tables that are listed
    /// in `/proc/net/ip_tables_names`.
    ///
    /// # Errors
    ///
    /// If the caller may not ask, there is no such table, or the kernel has no legacy tables at all.
    pub fn ask(&self, table: &str) -> io::Result<TableInfo> {
        let mut buffer = [0u8; LENGTH];
        let name = table.as_bytes();
        if name.len() >= NAME {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of a table has at most 31 bytes"));
        }
        for (place, byte) in buffer.iter_mut().zip(name) {
            *place = *byte;
        }
        let mut length = LENGTH as libc::socklen_t;
        #[allow(unsafe_code, reason = "see the module's invariant")]
        // SAFETY: the descriptor is open as long as `self` lives; `buffer` is LENGTH bytes of initialised memory that
        // nobody else refers to during the call, and `length` says so; the kernel reads and writes at most `length`
        // bytes of it and writes `length`; any bytes are valid contents of both.
        let status = unsafe {
            libc::getsockopt(self.socket.as_raw_fd(), self.level, GET_INFO, buffer.as_mut_ptr().cast(), &raw mut length)
        };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
        if length as usize != LENGTH {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel answered with another structure"));
        }
        Ok(decode(&buffer))
    }
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
    fn a_name_that_is_too_long_is_not_asked_for() {
        let asker = Asker::new(false).unwrap();
        let error = asker.ask(&"x".repeat(NAME)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
