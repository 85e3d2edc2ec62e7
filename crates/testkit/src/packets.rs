//! Real packets, sent from the calling thread's network namespace, and what became of them.
//!
//! Three verdicts and no fourth: somebody answered, nobody answered, or the network said no. A probe that cannot tell
//! (no route of its own, no socket) is an error and never a verdict.
//!
//! Fed by the end-to-end bed ([`Netns::enter`](crate::netns::Netns::enter) brings a thread to the right place).
//! Invariant: a payload carries a token that is unique to the probe, so that any number of probes may run at once.

use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind,
    recv, sendto, setsockopt, socket,
};

use crate::frames::{self, Token};

/// What became of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// It was answered (or, where no answer exists, it arrived).
    Ok,
    /// Nothing came back.
    Drop,
    /// An error packet came back: a TCP reset or an ICMP error.
    Refused,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Drop => "drop",
            Self::Refused => "refused",
        })
    }
}

/// Returns a token that no other probe of this or another process has.
#[must_use]
pub fn token() -> Token {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut token = *b"felix\0\0\0\0\0\0\0\0\0\0\0";
    token[5..9].copy_from_slice(&std::process::id().to_be_bytes());
    token[9..16].copy_from_slice(&COUNTER.fetch_add(1, Ordering::Relaxed).to_be_bytes()[1..]);
    token
}

/// Sends one ICMP or ICMPv6 echo request, with an id of 0x8000 or more, and waits for the reply.
///
/// # Errors
///
/// If the request cannot be sent at all.
pub fn echo(destination: IpAddr, limit: Duration) -> Result<Outcome> {
    let token = token();
    let echo = Echo::open(destination)?;
    let deadline = Instant::now() + limit;
    let id = 0x8000 | u16::from_be_bytes([token[14], token[15]]);
    if let Some(outcome) = send_verdict(echo.send(id, 1, &token))? {
        return Ok(outcome);
    }
    loop {
        match echo.receive(deadline.saturating_duration_since(Instant::now()))? {
            None => return Ok(Outcome::Drop),
            Some(Received { payload, kind }) if frames::contains(&payload, &token) => match kind {
                ReceivedKind::Reply => return Ok(Outcome::Ok),
                ReceivedKind::Error => return Ok(Outcome::Refused),
                ReceivedKind::Other => {}
            },
            Some(_) => {} // Somebody else's.
        }
    }
}

/// Bytes that may wait to be received, two seconds of a stream of one packet per millisecond.
const ROOM: usize = 4 << 20;

/// A raw ICMP or ICMPv6 socket for echo requests to one destination, for single pings and for streams of them.
#[derive(Debug)]
pub struct Echo {
    socket: UdpSocket,
    destination: IpAddr,
}

/// One ICMP message as an [`Echo`] saw it.
#[derive(Clone, Debug)]
pub struct Received {
    /// What the message is.
    pub kind: ReceivedKind,
    /// The message after its header of 8 bytes.
    pub payload: Vec<u8>,
}

/// What an ICMP message is to a pinger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceivedKind {
    /// An echo reply.
    Reply,
    /// Destination unreachable, time exceeded and the like; the payload quotes the packet.
    Error,
    /// Anything else, such as the requests that others send here.
    Other,
}

impl Echo {
    /// Opens the socket in the calling thread's namespace; it may then be used from any thread.
    ///
    /// # Errors
    ///
    /// If the process is not root.
    pub fn open(destination: IpAddr) -> Result<Self> {
        let (family, protocol) = match destination {
            IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
            IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).context("raw ICMP socket")?;
        // A receiver that has to wait for a processor must not look like a loss.
        setsockopt(&raw, RcvBufForce, &ROOM).context("room for answers")?;
        Ok(Self { socket: UdpSocket::from(raw), destination })
    }

    /// Returns a second handle, so that one thread may send while another receives.
    ///
    /// # Errors
    ///
    /// If there are no file descriptors left.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, destination: self.destination })
    }

    /// Sends one echo request.
    ///
    /// # Errors
    ///
    /// The kernel's, for example if there is no route.
    pub fn send(&self, id: u16, sequence: u16, payload: &[u8]) -> std::io::Result<()> {
        let message = frames::echo_request(self.destination, id, sequence, payload);
        self.socket.send_to(&message, SocketAddr::new(self.destination, 0)).map(drop)
    }

    /// Waits for one ICMP message; `None` if none came within `limit`.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn receive(&self, limit: Duration) -> Result<Option<Received>> {
        let Some(packet) = receive(&self.socket, limit)? else { return Ok(None) };
        // A raw IPv4 socket delivers the IP header as well (raw(7)), a raw IPv6 socket does not (ipv6(7)).
        let header = match self.destination {
            IpAddr::V4(_) => packet.first().map_or(0, |byte| usize::from(byte & 0x0f) * 4),
            IpAddr::V6(_) => 0,
        };
        let message = packet.get(header..).unwrap_or_default();
        let kind = match (self.destination, message.first()) {
            (IpAddr::V4(_), Some(0)) | (IpAddr::V6(_), Some(129)) => ReceivedKind::Reply,
            (IpAddr::V4(_), Some(3 | 11 | 12)) | (IpAddr::V6(_), Some(1..=4)) => ReceivedKind::Error,
            _ => ReceivedKind::Other,
        };
        Ok(Some(Received { kind, payload: message.get(8..).unwrap_or_default().to_vec() }))
    }
}

/// How long a connect has to wait so that a refusal is not taken for silence: Linux keeps an ICMPv6 error that answers
/// a SYN to itself until it sends the SYN again, after one second (net/ipv6/tcp_ipv6.c: tcp_v6_err).
const REFUSAL_IS_KNOWN: Duration = Duration::from_millis(1300);

/// Opens a TCP connection; waits a little longer than a second even if `limit` is less.
///
/// # Errors
///
/// If it fails for a reason that no verdict describes.
pub fn tcp(destination: SocketAddr, limit: Duration) -> Result<Outcome> {
    match TcpStream::connect_timeout(&destination, limit.max(REFUSAL_IS_KNOWN)) {
        Ok(_) => Ok(Outcome::Ok),
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(Outcome::Drop),
        Err(error) => send_verdict(Err(error))?.context("connect"),
    }
}

/// Sends one datagram and waits for its echo.
///
/// # Errors
///
/// If it cannot be sent for a reason that no verdict describes.
pub fn udp(destination: SocketAddr, limit: Duration) -> Result<Outcome> {
    let token = token();
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    let sent = socket.connect(destination).and_then(|()| socket.send(&token)).map(drop);
    if let Some(outcome) = send_verdict(sent)? {
        return Ok(outcome);
    }
    let deadline = Instant::now() + limit;
    loop {
        match receive(&socket, deadline.saturating_duration_since(Instant::now())) {
            Ok(None) => return Ok(Outcome::Drop),
            Ok(Some(reply)) if reply == token => return Ok(Outcome::Ok),
            Ok(Some(_)) => {}
            Err(error) => {
                return match error.downcast::<std::io::Error>() {
                    Ok(error) => send_verdict(Err(error))?.context("receive"),
                    Err(error) => Err(error),
                };
            }
        }
    }
}

/// Returns the verdict that an error means, `None` for a success, and the error itself if it means none.
fn send_verdict(sent: std::io::Result<()>) -> Result<Option<Outcome>> {
    let Err(error) = sent else { return Ok(None) };
    match error.raw_os_error().map(Errno::from_raw) {
        // What a reset or an ICMP error becomes (ip(7), icmp.c: icmp_err_convert, net/ipv6/icmp.c: tab_unreach).
        Some(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EACCES | Errno::ENOPROTOOPT) => {
            Ok(Some(Outcome::Refused))
        }
        // The sender's own OUTPUT hook dropped it: nothing left the host.
        Some(Errno::EPERM) => Ok(Some(Outcome::Drop)),
        _ => Err(error).context("send a probe"),
    }
}

/// Receives one packet; `None` if none came within `limit`.
fn receive(socket: &UdpSocket, limit: Duration) -> Result<Option<Vec<u8>>> {
    if limit.is_zero() {
        return Ok(None);
    }
    socket.set_read_timeout(Some(limit))?;
    let mut buffer = vec![0; 65_536];
    match socket.recv(&mut buffer) {
        Ok(length) => {
            buffer.truncate(length);
            Ok(Some(buffer))
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Sends a packet whose source address is not the sender's: a TCP SYN that carries `token`.
///
/// # Errors
///
/// If the kernel does not send it.
pub fn forged_syn(source: IpAddr, destination: SocketAddr, token: &Token) -> Result<()> {
    forged(source, destination.ip(), 6, &frames::syn(source, destination, token))
}

/// Sends a packet whose source address is not the sender's: an echo request that carries `token`.
///
/// # Errors
///
/// If the kernel does not send it.
pub fn forged_echo(source: IpAddr, destination: IpAddr, token: &Token) -> Result<()> {
    let mut message = frames::echo_request(destination, 1, 1, token);
    let protocol = match destination {
        IpAddr::V4(_) => 1,
        IpAddr::V6(_) => {
            frames::seal(&mut message, 2, source, destination, 58);
            58
        }
    };
    forged(source, destination, protocol, &message)
}

/// Sends `payload` behind an IP header that is made here.
fn forged(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Result<()> {
    let packet = frames::ip(source, destination, protocol, payload)?;
    // IPPROTO_RAW implies that the caller brings the header (raw(7), ipv6(7)).
    let open = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
    match destination {
        IpAddr::V4(address) => {
            let raw = open(AddressFamily::Inet)?;
            sendto_exactly(&raw, &packet, &SockaddrIn::from(std::net::SocketAddrV4::new(address, 0)))
        }
        IpAddr::V6(address) => {
            let raw = open(AddressFamily::Inet6)?;
            sendto_exactly(&raw, &packet, &SockaddrIn6::from(std::net::SocketAddrV6::new(address, 0, 0, 0)))
        }
    }
}

fn sendto_exactly(raw: &OwnedFd, packet: &[u8], to: &dyn nix::sys::socket::SockaddrLike) -> Result<()> {
    let sent = sendto(std::os::fd::AsRawFd::as_raw_fd(raw), packet, to, MsgFlags::empty())?;
    ensure!(sent == packet.len(), "sent {sent} of {} bytes", packet.len());
    Ok(())
}

/// Broadcasts what a DHCP client without an address sends: UDP from 0.0.0.0:68 to 255.255.255.255:67.
///
/// # Errors
///
/// If there is no such interface or the frame cannot be sent.
pub fn dhcp_broadcast(interface: &str, token: &Token) -> Result<()> {
    let (raw, address) = packet_socket(interface)?;
    let mac = address.addr().context("the interface has no MAC address")?;
    UdpSocket::from(raw).send(&frames::dhcp(mac, token))?;
    Ok(())
}

/// Sees every frame that arrives at an interface, before any filter of its host.
#[derive(Debug)]
pub struct Sniffer {
    socket: UdpSocket,
}

impl Sniffer {
    /// Starts to listen on `interface` of the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// If there is no such interface or the process is not root.
    pub fn open(interface: &str) -> Result<Self> {
        let (raw, _) = packet_socket(interface)?;
        Ok(Self { socket: UdpSocket::from(raw) })
    }

    /// Returns whether a frame with `token` has arrived or arrives within `limit`.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn sees(&self, token: &Token, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while let Some(frame) = receive(&self.socket, deadline.saturating_duration_since(Instant::now()))? {
            if frames::contains(&frame, token) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// One end of a wire: frames are sent as they are, and all that arrive are seen.
#[derive(Debug)]
pub struct Wire {
    socket: UdpSocket,
    mac: [u8; 6],
}

impl Wire {
    /// Opens `interface` of the calling thread's namespace; it may then be used from any thread.
    ///
    /// # Errors
    ///
    /// If there is no such interface or the process is not root.
    pub fn open(interface: &str) -> Result<Self> {
        let (raw, address) = packet_socket(interface)?;
        let mac = address.addr().context("the interface has no MAC address")?;
        Ok(Self { socket: UdpSocket::from(raw), mac })
    }

    /// Returns the interface's own address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Sends one frame.
    ///
    /// # Errors
    ///
    /// If the interface is down.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = self.socket.send(frame)?;
        ensure!(sent == frame.len(), "sent {sent} of {} bytes", frame.len());
        Ok(())
    }

    /// Waits for one frame; `None` if none came within `limit`. With a limit of zero it takes what is there.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn receive(&self, limit: Duration) -> Result<Option<Vec<u8>>> {
        if !limit.is_zero() {
            return receive(&self.socket, limit);
        }
        let mut buffer = vec![0; 2048];
        match recv(std::os::fd::AsRawFd::as_raw_fd(&self.socket), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => {
                buffer.truncate(length);
                Ok(Some(buffer))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Forgets all connections that the calling thread's namespace tracks (`IPCTNL_MSG_CT_DELETE` without a filter).
///
/// # Errors
///
/// If the process is not root or the kernel does not track connections.
pub fn forget_connections() -> Result<()> {
    const LENGTH: u32 = 20;
    const CT_DELETE: u16 = 1 << 8 | 2;
    const REQUEST_WITH_ACK: u16 = 1 | 4;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
        .context("netfilter's netlink socket")?;
    let mut message = LENGTH.to_ne_bytes().to_vec();
    message.extend(CT_DELETE.to_ne_bytes());
    message.extend(REQUEST_WITH_ACK.to_ne_bytes());
    message.extend([0; 8]); // Sequence number and port.
    message.extend([0; 4]); // Of any family, version 0, no resource.
    sendto_exactly(&netlink, &message, &NetlinkAddr::new(0, 0))?;
    let mut answer = [0; 64];
    let length = recv(std::os::fd::AsRawFd::as_raw_fd(&netlink), &mut answer, MsgFlags::empty())?;
    let error = answer.get(16..20).filter(|_| length >= 20).context("a short answer")?;
    let error = i32::from_ne_bytes(error.try_into()?);
    ensure!(error == 0, "the kernel keeps the connections: {}", Errno::from_raw(-error));
    Ok(())
}

/// Opens a packet socket bound to the interface and returns it with the interface's address.
fn packet_socket(interface: &str) -> Result<(OwnedFd, LinkAddr)> {
    let Some(address) = nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
    else {
        bail!("no interface {interface}");
    };
    // Received from the interface only: the address carries its index (packet(7)).
    let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("AF_PACKET")?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&raw), &address).with_context(|| format!("bind to {interface}"))?;
    Ok((raw, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel_test;
    use crate::netns::{Netns, in_new_netns};
    use std::net::TcpListener;

    const LIMIT: Duration = Duration::from_secs(1);
    const SHORT: Duration = Duration::from_millis(200);

    /// Returns 192.0.2.1 and 2001:db8::1 with 192.0.2.2 and 2001:db8::2 at the other end of the wire.
    fn two_hosts() -> (Netns, Netns) {
        let here = Netns::new("here").unwrap();
        let there = Netns::new("there").unwrap();
        here.veth("eth0", &there, "eth0").unwrap();
        for (netns, last) in [(&here, 1), (&there, 2)] {
            let add = format!("ip addr add 192.0.2.{last}/24 dev eth0; ip addr add 2001:db8::{last}/64 dev eth0 nodad");
            netns.sh(&format!("{add}; ip link set eth0 up")).unwrap();
        }
        here.await_up("eth0").unwrap();
        there.await_up("eth0").unwrap();
        (here, there)
    }

    #[test]
    fn a_service_that_answers_is_ok_and_a_port_without_one_refuses_in_both_families() {
        kernel_test!();
        in_new_netns(|| {
            for loopback in ["127.0.0.1", "::1"] {
                let loopback: IpAddr = loopback.parse().unwrap();
                let listener = TcpListener::bind((loopback, 80)).unwrap();
                let server = UdpSocket::bind((loopback, 5000)).unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        let mut buffer = [0; 64];
                        let (length, from) = server.recv_from(&mut buffer).unwrap();
                        server.send_to(&buffer[..length], from).unwrap();
                    });
                    assert_eq!(udp((loopback, 5000).into(), LIMIT).unwrap(), Outcome::Ok);
                });
                assert_eq!(udp((loopback, 5001).into(), LIMIT).unwrap(), Outcome::Refused);
                assert_eq!(tcp((loopback, 80).into(), LIMIT).unwrap(), Outcome::Ok);
                assert_eq!(tcp((loopback, 81).into(), LIMIT).unwrap(), Outcome::Refused);
                assert_eq!(echo(loopback, LIMIT).unwrap(), Outcome::Ok);
                drop(listener);
            }
        });
    }

    #[test]
    fn silence_is_a_drop_and_an_icmp_error_is_a_refusal() {
        kernel_test!("iptables-legacy", "ip6tables-legacy");
        let (here, there) = two_hosts();
        let addresses = ["192.0.2.2", "2001:db8::2"].map(|text| text.parse::<IpAddr>().unwrap());
        for (target, expected) in [("REJECT", Outcome::Refused), ("DROP", Outcome::Drop)] {
            for tool in ["iptables-legacy", "ip6tables-legacy"] {
                // Neighbour discovery stays open: an unresolved neighbour is another kind of silence.
                there
                    .sh(&format!("{tool} -w -F; for p in tcp udp; do {tool} -w -A INPUT -p $p -j {target}; done"))
                    .unwrap();
                let echo = if tool.starts_with("ip6") { "icmpv6 --icmpv6-type echo-request" } else { "icmp" };
                there.sh(&format!("{tool} -w -A INPUT -p {echo} -j {target}")).unwrap();
            }
            for address in addresses {
                here.enter(|| {
                    assert_eq!(echo(address, SHORT).unwrap(), expected, "echo {address}");
                    assert_eq!(tcp((address, 80).into(), SHORT).unwrap(), expected, "tcp {address}");
                    assert_eq!(udp((address, 80).into(), SHORT).unwrap(), expected, "udp {address}");
                });
            }
        }
    }

    #[test]
    fn a_sniffer_sees_forged_packets_and_the_broadcast_of_a_client_without_address() {
        kernel_test!();
        let (here, there) = two_hosts();
        let sniffer = there.enter(|| Sniffer::open("eth0").unwrap());
        for (source, destination) in [("192.0.2.77", "192.0.2.2"), ("2001:db8::77", "2001:db8::2")] {
            let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
            let (syn, ping) = (token(), token());
            here.enter(|| {
                forged_syn(source, (destination, 22).into(), &syn).unwrap();
                forged_echo(source, destination, &ping).unwrap();
            });
            assert!(sniffer.sees(&syn, LIMIT).unwrap(), "syn from {source}");
            assert!(sniffer.sees(&ping, LIMIT).unwrap(), "echo from {source}");
        }
        let server = there.enter(|| UdpSocket::bind("0.0.0.0:67").unwrap());
        server.set_read_timeout(Some(LIMIT)).unwrap();
        let dhcp = token();
        here.enter(|| dhcp_broadcast("eth0", &dhcp).unwrap());
        let mut buffer = [0; 1500];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert!(frames::contains(&buffer[..length], &dhcp));
        assert_eq!(from.to_string(), "0.0.0.0:68");
        assert!(!sniffer.sees(&token(), SHORT).unwrap(), "a token that nobody sent");
    }
}
