//! IP sets straight from the kernel: the floor of what sets cost, and the eyes of the end-to-end parts.
//!
//! Independent of the agent's own encoder (performance.md 4.6 has the format). Sets are of type `hash:net`, which is
//! what the agent makes of selectors; members are IPv4 addresses.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};

const CREATE: u16 = 2;
const DESTROY: u16 = 3;
const ADD: u16 = 9;
const DEL: u16 = 10;
const TEST: u16 = 11;

const SETNAME: u16 = 2;
const DATA: u16 = 7;
const ADT: u16 = 8;
const LINENO: u16 = 9;
const NESTED: u16 = 0x8000;
const NETWORK_ORDER: u16 = 0x4000;

/// Between two questions; without it the one who asks would take a processor for itself.
const PACE: Duration = Duration::from_micros(20);

/// Members of one message; an attribute holds 65,535 bytes.
const BATCH: usize = 2_000;

const MISSING: i32 = -2;
/// `IPSET_ERR_EXIST`: of a test, that the member is not there.
const NOT_A_MEMBER: i32 = -4103;

/// One socket of the calling thread's namespace.
#[derive(Debug)]
pub(crate) struct RawSets {
    socket: OwnedFd,
    sequence: u32,
    message: Vec<u8>,
}

impl RawSets {
    pub(crate) fn open() -> Result<Self> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
                .context("a netlink socket")?;
        setsockopt(&socket, sockopt::SndBuf, &(1 << 20)).context("the send buffer")?;
        Ok(Self { socket, sequence: 0, message: Vec::new() })
    }

    /// Returns whether the set is there and holds the address, alone or in a network.
    pub(crate) fn contains(&mut self, set: &str, address: Ipv4Addr) -> Result<bool> {
        self.begin(TEST, set);
        let data = self.open_nested(DATA);
        self.address(address);
        self.close(data);
        match self.ask()? {
            0 => Ok(true),
            NOT_A_MEMBER | MISSING => Ok(false),
            code => bail!("testing a member of {set}: error {code}"),
        }
    }

    /// Waits until each address is in its set, or is not, and returns when the last of them was so.
    ///
    /// Asking is slow beside the kernel: what is as expected at the first question counts as having been so when the
    /// one before was. So what is written last belongs first.
    pub(crate) fn wait(&mut self, expected: &[(&str, Ipv4Addr, bool)], limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        let mut at = None;
        for (set, address, present) in expected {
            let mut asked = 0;
            while self.contains(set, *address)? != *present {
                ensure!(Instant::now() < deadline, "{address} in {set}: still not {present}");
                std::thread::sleep(PACE);
                asked += 1;
            }
            if asked > 0 || at.is_none() {
                at = Some(Instant::now());
            }
        }
        at.context("nothing to wait for")
    }

    pub(crate) fn exists(&mut self, set: &str) -> Result<bool> {
        self.begin(TEST, set);
        let data = self.open_nested(DATA);
        self.address(Ipv4Addr::new(192, 0, 2, 255));
        self.close(data);
        match self.ask()? {
            0 | NOT_A_MEMBER => Ok(true),
            MISSING => Ok(false),
            code => bail!("looking for {set}: error {code}"),
        }
    }

    /// Makes a set with room for `members` without ever growing its hash table.
    pub(crate) fn create(&mut self, set: &str, members: u32) -> Result<()> {
        const TYPENAME: u16 = 3;
        const REVISION: u16 = 4;
        const FAMILY: u16 = 5;
        const HASHSIZE: u16 = 18;
        const MAXELEM: u16 = 19;
        self.begin(CREATE, set);
        self.attribute(TYPENAME, b"hash:net\0");
        self.attribute(REVISION, &[3]);
        self.attribute(FAMILY, &[2]);
        let data = self.open_nested(DATA);
        self.attribute(HASHSIZE | NETWORK_ORDER, &members.next_power_of_two().max(64).to_be_bytes());
        self.attribute(MAXELEM | NETWORK_ORDER, &members.max(65_536).to_be_bytes());
        self.close(data);
        self.expect_done("making", set)
    }

    pub(crate) fn add(&mut self, set: &str, members: impl IntoIterator<Item = Ipv4Addr>) -> Result<()> {
        self.members(ADD, set, members)
    }

    pub(crate) fn remove(&mut self, set: &str, members: impl IntoIterator<Item = Ipv4Addr>) -> Result<()> {
        self.members(DEL, set, members)
    }

    pub(crate) fn destroy(&mut self, set: &str) -> Result<()> {
        self.begin(DESTROY, set);
        self.expect_done("destroying", set)
    }

    fn members(&mut self, command: u16, set: &str, members: impl IntoIterator<Item = Ipv4Addr>) -> Result<()> {
        let mut members = members.into_iter().peekable();
        while members.peek().is_some() {
            self.begin(command, set);
            self.attribute(LINENO | NETWORK_ORDER, &[0; 4]);
            let list = self.open_nested(ADT);
            for member in members.by_ref().take(BATCH) {
                let data = self.open_nested(DATA);
                self.address(member);
                self.close(data);
            }
            self.close(list);
            self.expect_done("members of", set)?;
        }
        Ok(())
    }

    // Messages.

    fn begin(&mut self, command: u16, set: &str) {
        const NFNETLINK_IPSET: u16 = 6;
        const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
        self.sequence += 1;
        self.message.clear();
        self.message.extend(0_u32.to_ne_bytes());
        self.message.extend((NFNETLINK_IPSET << 8 | command).to_ne_bytes());
        self.message.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
        self.message.extend(self.sequence.to_ne_bytes());
        self.message.extend(0_u32.to_ne_bytes());
        // The header of nfnetlink: IPv4.
        self.message.extend([2, 0, 0, 0]);
        self.attribute(1, &[6]);
        let mut name = set.as_bytes().to_vec();
        name.push(0);
        self.attribute(SETNAME, &name);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.message.extend((value.len() as u16 + 4).to_ne_bytes());
        self.message.extend(kind.to_ne_bytes());
        self.message.extend(value);
        self.message.resize(self.message.len().next_multiple_of(4), 0);
    }

    fn open_nested(&mut self, kind: u16) -> usize {
        let place = self.message.len();
        self.attribute(kind | NESTED, &[]);
        place
    }

    fn close(&mut self, place: usize) {
        let length = (self.message.len() - place) as u16;
        if let Some(field) = self.message.get_mut(place..place + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn address(&mut self, address: Ipv4Addr) {
        const IP: u16 = 1;
        const IPV4: u16 = 1;
        let place = self.open_nested(IP);
        self.attribute(IPV4 | NETWORK_ORDER, &address.octets());
        self.close(place);
    }

    fn expect_done(&mut self, what: &str, set: &str) -> Result<()> {
        match self.ask()? {
            0 => Ok(()),
            code => bail!("{what} {set}: error {code}"),
        }
    }

    /// Sends the message and returns the code of the acknowledgement.
    fn ask(&mut self) -> Result<i32> {
        const NLMSG_ERROR: u16 = 2;
        let length = self.message.len() as u32;
        if let Some(field) = self.message.get_mut(..4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        let socket = self.socket.as_raw_fd();
        sendto(socket, &self.message, &NetlinkAddr::new(0, 0), MsgFlags::empty()).context("asking the kernel")?;
        let mut answer = vec![0; 70_000];
        loop {
            let read = recv(socket, &mut answer, MsgFlags::empty()).context("the kernel's answer")?;
            ensure!(read >= 20, "an answer of {read} bytes");
            let word = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; 4]);
            let kind = u16::from_ne_bytes([answer.get(4).copied().unwrap_or(0), answer.get(5).copied().unwrap_or(0)]);
            if kind == NLMSG_ERROR && u32::from_ne_bytes(word(8)) == self.sequence {
                return Ok(i32::from_ne_bytes(word(16)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_made_filled_asked_and_destroyed() {
        testkit::kernel_test!("ipset");
        testkit::netns::in_new_netns(|| {
            let mut sets = RawSets::open().unwrap();
            assert!(!sets.exists("a").unwrap());
            sets.create("a", 5_000).unwrap();
            sets.add("a", (0..5_000).map(|n| Ipv4Addr::from(0x0a00_0000 + n))).unwrap();
            sets.remove("a", [Ipv4Addr::new(10, 0, 0, 7)]).unwrap();
            assert!(sets.exists("a").unwrap());
            assert!(sets.contains("a", Ipv4Addr::new(10, 0, 19, 135)).unwrap());
            for absent in [Ipv4Addr::new(10, 0, 0, 7), Ipv4Addr::new(10, 0, 19, 136)] {
                assert!(!sets.contains("a", absent).unwrap(), "{absent}");
            }
            sets.destroy("a").unwrap();
            assert!(!sets.exists("a").unwrap() && !sets.contains("a", Ipv4Addr::new(10, 0, 0, 1)).unwrap());
        });
    }
}
