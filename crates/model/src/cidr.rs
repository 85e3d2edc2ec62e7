//! CIDR-or-IP text as Calico writes and reads it (datastore.md J-5, J-6).
//!
//! Invariant: what is returned has its host bits cleared and is never an IPv4-mapped IPv6 address.
//! Printing is `IpNet`'s own `Display`, which is the form of J-6.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Bits of an IPv6 address before an embedded IPv4 address.
const MAPPED_PREFIX: u8 = 96;

/// Parses `address/length` or a bare address, which means a /32 or /128.
///
/// Returns `None` for everything else: octets with leading zeros, zones, lengths that are too large or
/// not plain digits.
pub fn parse_net(text: &str) -> Option<IpNet> {
    let Some((address, length)) = text.split_once('/') else {
        return parse_ip(text).map(IpNet::from);
    };
    let address: IpAddr = address.parse().ok()?;
    if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let length: u8 = length.parse().ok()?;
    let (address, length) = match (address, length.checked_sub(MAPPED_PREFIX)) {
        (IpAddr::V6(v6), Some(short)) => match v6.to_ipv4_mapped() {
            Some(v4) => (IpAddr::V4(v4), short),
            None => (address, length),
        },
        (IpAddr::V6(_), None) | (IpAddr::V4(_), _) => (address, length),
    };
    Some(IpNet::new(address, length).ok()?.trunc())
}

/// Parses an address without a length.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// Splits by family, order kept.
pub fn split(nets: impl IntoIterator<Item = IpNet>) -> (Vec<Ipv4Net>, Vec<Ipv6Net>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for net in nets {
        match net {
            IpNet::V4(net) => v4.push(net),
            IpNet::V6(net) => v6.push(net),
        }
    }
    (v4, v6)
}

/// Parses a hardware address: six bytes in hexadecimal, as `aa:bb:cc:dd:ee:ff`, `aa-bb-cc-dd-ee-ff` or
/// `aabb.ccdd.eeff`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let (separator, digits) = match text.as_bytes().get(2) {
        Some(b':') => (':', 2),
        Some(b'-') => ('-', 2),
        Some(_) => ('.', 4),
        None => return None,
    };
    let mut mac = [0; 6];
    let mut bytes = mac.iter_mut();
    for part in text.split(separator) {
        if part.len() != digits || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let value = u16::from_str_radix(part, 16).ok()?;
        let [high, low] = value.to_be_bytes();
        if digits == 4 {
            *bytes.next()? = high;
        }
        *bytes.next()? = low;
    }
    bytes.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nets_are_masked_and_printed_in_one_form() {
        for (given, wanted) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("10.0.0.1", Some("10.0.0.1/32")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("FD00:0:0::1/064", Some("fd00::/64")),
            ("fd00::5", Some("fd00::5/128")),
            ("::ffff:10.0.0.1", Some("10.0.0.1/32")),
            ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
            ("::ffff:10.0.0.1/64", Some("::/64")),
            ("10.0.0.0/24/32", None),
            ("10.0.0.01", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/256", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/", None),
            ("10.0.0/8", None),
            ("fd00::/129", None),
            ("fe80::1%eth0", None),
            (" 10.0.0.1", None),
            ("", None),
        ] {
            assert_eq!(parse_net(given).map(|net| net.to_string()).as_deref(), wanted, "{given}");
        }
    }

    #[test]
    fn hardware_addresses_have_six_bytes() {
        let wanted = Some([0xfa, 0x16, 0x3e, 0x11, 0x22, 0x33]);
        for given in ["fa:16:3e:11:22:33", "FA-16-3E-11-22-33", "fa16.3e11.2233"] {
            assert_eq!(parse_mac(given), wanted, "{given}");
        }
        for given in [
            "",
            "fa",
            "fa:16:3e:11:22",
            "fa:16:3e:11:22:33:44",
            "fa:16:3e:11:22:3",
            "fa:16-3e:11:22:33",
            "fa:16:3e:11:22:+3",
            "fa163e112233",
        ] {
            assert_eq!(parse_mac(given), None, "{given}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*", near in "[0-9a-f:./-]{0,30}") {
            for text in [text, near] {
                let _net: Option<IpNet> = parse_net(&text);
                let _mac: Option<[u8; 6]> = parse_mac(&text);
            }
        }
    }
}
