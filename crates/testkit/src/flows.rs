//! Fills the connection tracking table of a namespace with flows that no packet has made, thousands in a message.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, connect, send, socket,
};
use std::os::fd::{AsRawFd as _, OwnedFd};

/// Bytes in one send.
const BATCH: usize = 30_000;

/// Adds tracked flows to the namespace of the thread that made it.
#[derive(Debug)]
pub struct Filler {
    socket: OwnedFd,
    bytes: Vec<u8>,
    port: u16,
}

impl Filler {
    /// Opens a socket in the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn new() -> Result<Self> {
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, bytes: Vec::new(), port: 0 })
    }

    /// Adds one UDP flow from `original[0]` to `original[1]`, answered as `reply` says. Each has a port of its own.
    ///
    /// # Errors
    ///
    /// If the kernel takes no more messages.
    pub fn add(&mut self, original: [IpAddr; 2], reply: [IpAddr; 2]) -> Result<()> {
        self.port = self.port.wrapping_add(1);
        let family = if original[0].is_ipv4() { 2 } else { 10 };
        let mut body = vec![family, 0, 0, 0];
        body.extend(tuple(1, original, [self.port, 53]));
        body.extend(tuple(2, reply, [53, self.port]));
        // CTA_TIMEOUT.
        body.extend(attribute(7, &1000_u32.to_be_bytes()));
        self.bytes.extend(u32::try_from(16 + body.len())?.to_ne_bytes());
        // IPCTNL_MSG_CT_NEW; NLM_F_REQUEST | NLM_F_CREATE.
        self.bytes.extend(0x100_u16.to_ne_bytes());
        self.bytes.extend(0x401_u16.to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend(body);
        if self.bytes.len() > BATCH { self.flush() } else { Ok(()) }
    }

    /// Sends what has been added; to be called at the end.
    ///
    /// # Errors
    ///
    /// If the kernel takes no more messages.
    pub fn flush(&mut self) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), &self.bytes, MsgFlags::empty())?;
        ensure!(sent == self.bytes.len(), "a message was cut");
        self.bytes.clear();
        Ok(())
    }
}

/// Returns how many flows the namespace of the calling thread has.
///
/// # Errors
///
/// If the kernel does not say.
pub fn count() -> Result<u64> {
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let text = std::fs::read_to_string(path).context(path)?;
    Ok(text.trim().parse()?)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn tuple(kind: u16, [source, destination]: [IpAddr; 2], ports: [u16; 2]) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => (1, address.octets().to_vec()),
        IpAddr::V6(address) => (3, address.octets().to_vec()),
    };
    let (first, source) = octets(source);
    let (_, destination) = octets(destination);
    let ip = [attribute(first, &source), attribute(first + 1, &destination)].concat();
    // UDP.
    let proto = [attribute(1, &[17]), attribute(2, &ports[0].to_be_bytes()), attribute(3, &ports[1].to_be_bytes())];
    let parts = [attribute(0x8001, &ip), attribute(0x8002, &proto.concat())].concat();
    attribute(0x8000 | kind, &parts)
}
