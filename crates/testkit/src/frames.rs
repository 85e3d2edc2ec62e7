//! The bytes of the packets that [`packets`](crate::packets) sends: headers and checksums.
//!
//! Pure: addresses in, bytes out. Layouts are those of RFC 791, 792, 768, 9293, 8200 and 4443.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail};

/// What a packet carries so that it is recognised anywhere on its way.
pub type Token = [u8; 16];

/// Returns whether `token` occurs in `frame`.
#[must_use]
pub fn contains(frame: &[u8], token: &Token) -> bool {
    frame.windows(token.len()).any(|window| window == token)
}

/// Returns the Internet checksum (RFC 1071) of the pieces put together; only the last may be of odd length.
fn checksum(pieces: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for piece in pieces {
        for pair in piece.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Writes the checksum over the pseudo header and `message` into `message` at `offset`.
pub fn seal(message: &mut [u8], offset: usize, source: IpAddr, destination: IpAddr, protocol: u8) {
    message[offset..offset + 2].fill(0);
    let length = (message.len() as u32).to_be_bytes();
    let pseudo = [0, 0, 0, protocol];
    let sum = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            checksum(&[&source.octets(), &destination.octets(), &pseudo, &length, message])
        }
        (source, destination) => checksum(&[&octets(source), &octets(destination), &length, &pseudo, message]),
    };
    message[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Returns an address as 16 bytes.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Returns an echo request; that of ICMPv6 has no checksum yet, the kernel or [`seal`] adds it.
#[must_use]
pub fn echo_request(destination: IpAddr, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if destination.is_ipv4() { 8 } else { 128 };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(payload);
    if destination.is_ipv4() {
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

/// Returns a TCP segment that opens a connection and has the token as data; its source port follows from the token.
#[must_use]
pub fn syn(source: IpAddr, destination: SocketAddr, token: &Token) -> Vec<u8> {
    let port = 0x8000 | u16::from_be_bytes([token[14], token[15]]);
    syn_between(SocketAddr::new(source, port), destination, token)
}

/// Returns a TCP segment that opens a connection and has the token as data.
#[must_use]
pub fn syn_between(source: SocketAddr, destination: SocketAddr, token: &Token) -> Vec<u8> {
    let mut segment = ports(source, destination);
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0]); // Sequence number, acknowledgement.
    segment.extend([5 << 4, 0x02, 0xff, 0xff, 0, 0, 0, 0]); // Header length, SYN, window, checksum, urgent.
    segment.extend(token);
    seal(&mut segment, 16, source.ip(), destination.ip(), 6);
    segment
}

/// Returns a UDP datagram that has the token as data.
#[must_use]
pub fn udp(source: SocketAddr, destination: SocketAddr, token: &Token) -> Vec<u8> {
    let mut datagram = ports(source, destination);
    datagram.extend((8 + token.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(token);
    seal(&mut datagram, 6, source.ip(), destination.ip(), 17);
    if datagram[6..8] == [0, 0] {
        datagram[6..8].fill(0xff); // Zero says that there is no checksum (RFC 768).
    }
    datagram
}

/// Returns an SCTP packet that opens an association (RFC 9260, 3.3.2) and has the token in a parameter to be skipped.
#[must_use]
pub fn sctp_init(source: SocketAddr, destination: SocketAddr, token: &Token) -> Vec<u8> {
    let mut packet = ports(source, destination);
    packet.extend([0; 8]); // Verification tag, checksum.
    packet.extend([1, 0, 0, 20 + 4 + token.len() as u8]); // INIT, flags, length.
    packet.extend([0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]); // Tag, window, streams out and in, first number.
    packet.extend([0x80, 0x01, 0, 4 + token.len() as u8]);
    packet.extend(token);
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

/// Returns an ICMP message of the family of the addresses, with the token as data.
#[must_use]
pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, id: u16, token: &Token) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend([0, 1]);
    message.extend(token);
    if destination.is_ipv4() {
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    } else {
        seal(&mut message, 2, source, destination, 58);
    }
    message
}

/// Returns an ICMP error of the family of the addresses about a packet: its header, 8 bytes of what follows, the token.
#[must_use]
pub fn icmp_error(source: IpAddr, destination: IpAddr, kind: u8, about: &[u8], token: &Token) -> Vec<u8> {
    let header = if destination.is_ipv4() { 20 } else { 40 };
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(&about[..about.len().min(header + 8)]);
    message.extend(token);
    if destination.is_ipv4() {
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    } else {
        seal(&mut message, 2, source, destination, 58);
    }
    message
}

/// Returns an Ethernet frame with an IP packet in it; nobody looks at who has sent it.
#[must_use]
pub fn ethernet(to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
    let mut frame = to.to_vec();
    frame.extend([0x02, 0, 0, 0, 0, 0x77]);
    frame.extend(kind);
    frame.extend(packet);
    frame
}

/// What an Ethernet frame with an IP packet says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub payload: &'a [u8],
}

/// Reads an Ethernet frame; `None` if it has no whole IP packet.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Contents<'_>> {
    let (head, packet) = frame.split_at_checked(14)?;
    let word = |at: usize| Some(usize::from(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?)));
    match head.get(12..)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            Some(Contents {
                source: address(12)?,
                destination: address(16)?,
                protocol: *packet.get(9)?,
                payload: packet.get(header..word(2)?)?,
            })
        }
        [0x86, 0xdd] => {
            let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            Some(Contents {
                source: address(8)?,
                destination: address(24)?,
                protocol: *packet.get(6)?,
                payload: packet.get(40..40 + word(4)?)?,
            })
        }
        _ => None,
    }
}

/// Returns the two port numbers that transport headers begin with.
fn ports(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat()
}

/// Returns the checksum of SCTP (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// Returns an IP packet.
///
/// # Errors
///
/// If the addresses are of different families.
pub fn ip(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Result<Vec<u8>> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Ok(ipv4(source, destination, protocol, payload)),
        (IpAddr::V6(source), IpAddr::V6(destination)) => Ok(ipv6(source, destination, protocol, payload)),
        _ => bail!("{source} and {destination} are of different families"),
    }
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]); // Id, don't fragment, TTL, checksum.
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([protocol, 64]); // Next header, hop limit.
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// Returns the Ethernet frame of a client that has no address: UDP 0.0.0.0:68 to 255.255.255.255:67.
#[must_use]
pub fn dhcp(mac: [u8; 6], token: &Token) -> Vec<u8> {
    let (source, destination) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
    let mut datagram = Vec::new();
    datagram.extend(68_u16.to_be_bytes());
    datagram.extend(67_u16.to_be_bytes());
    datagram.extend((8 + token.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(token);
    seal(&mut datagram, 6, source.into(), destination.into(), 17);
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([0x08, 0x00]);
    frame.extend(ipv4(source, destination, 17, &datagram));
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // RFC 1071, section 3: the sum of these is 0xddf2.
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
        assert_eq!(checksum(&[&[0x01]]), !0x0100);
    }

    #[test]
    fn a_sealed_message_sums_to_zero_together_with_its_pseudo_header() {
        let (source, destination): (IpAddr, IpAddr) = ("10.65.0.12".parse().unwrap(), "10.65.0.21".parse().unwrap());
        let segment = syn(source, SocketAddr::new(destination, 22), &[7; 16]);
        let pseudo = [10, 65, 0, 12, 10, 65, 0, 21, 0, 6, 0, segment.len() as u8];
        assert_eq!(checksum(&[&pseudo, &segment]), 0);
        assert!(contains(&segment, &[7; 16]));
        assert!(!contains(&segment, &[8; 16]));
    }

    #[test]
    fn the_checksum_of_sctp_is_that_of_the_rfcs() {
        // The check value of CRC-32C, and RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_frame_is_read_back_as_it_was_made() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
            let payload = icmp(source, destination, 8, 0, 7, &[9; 16]);
            let mut frame = ethernet([2; 6], &ip(source, destination, 1, &payload).unwrap());
            // Ethernet pads short frames.
            frame.extend([0; 4]);
            assert_eq!(read(&frame), Some(Contents { source, destination, protocol: 1, payload: &payload }));
            assert_eq!(read(&frame[..frame.len() - 5]), None);
        }
        assert_eq!(read(&[0; 60]), None);
    }

    #[test]
    fn addresses_of_different_families_make_no_packet() {
        assert!(ip("10.0.0.1".parse().unwrap(), "::1".parse().unwrap(), 6, &[]).is_err());
    }
}
