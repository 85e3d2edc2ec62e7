//! Comma lists and what can be in them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use model::PortRange;

use super::{of, regexp};
use crate::value::{PortProtocol, ProtocolPort, Value};

/// Longest name of an interface.
const LONGEST_INTERFACE: usize = 15;
/// Most routing tables that one parameter may claim.
const MOST_TABLES: u64 = 65535;

/// Parses name prefixes; no blanks, no empty item.
pub(super) fn interfaces(text: &str) -> Result<Value, String> {
    let names: Vec<String> = text.split(',').map(str::to_owned).collect();
    if names.iter().all(|name| is_interface(name)) {
        Ok(Value::List(names))
    } else {
        Err("not a comma list of interface names of at most 15 letters, digits, `_` and `-`".to_owned())
    }
}

/// Parses exact names and `/regular expressions/`; an expression has neither a comma nor a blank.
pub(super) fn interface_patterns(text: &str) -> Result<Value, String> {
    let items: Vec<String> = text.split(',').map(str::to_owned).collect();
    for item in &items {
        let expression = item.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
        match expression.filter(|expression| !expression.is_empty() && !expression.contains(char::is_whitespace)) {
            Some(expression) => regexp(expression)?,
            None if is_interface(item) => (),
            None => return Err("an item is neither an interface name nor a /regular expression/".to_owned()),
        }
    }
    Ok(Value::List(items))
}

/// Parses names that may end in the wildcard `+`.
pub(super) fn interface_matches(text: &str) -> Result<Value, String> {
    let items: Vec<String> =
        text.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect();
    if items.iter().all(|item| is_interface_match(item)) {
        Ok(Value::List(items))
    } else {
        Err("an item is not an interface name of at most 15 characters".to_owned())
    }
}

pub(super) fn is_interface_match(text: &str) -> bool {
    text.len() <= LONGEST_INTERFACE && of(text, ":._+-")
}

fn is_interface(text: &str) -> bool {
    text.len() <= LONGEST_INTERFACE && of(text, "_-")
}

/// Parses networks, clearing host bits, and addresses.
pub(super) fn nets(text: &str) -> Result<Value, String> {
    items(text)
        .map(|item| net(item).ok_or_else(|| "an item is neither a network nor an address".to_owned()))
        .collect::<Result<_, _>>()
        .map(Value::Nets)
}

fn net(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc())
}

/// Parses `[proto:][net:]port` items.
pub(super) fn ports(text: &str) -> Result<Value, String> {
    items(text).map(protocol_port).collect::<Result<_, _>>().map(Value::Ports)
}

fn protocol_port(item: &str) -> Result<ProtocolPort, String> {
    if item.contains(['[', ']']) {
        let (before, rest) = item.split_once('[').ok_or("an item has a `]` without `[`")?;
        let (inside, port) = rest.split_once("]:").ok_or("an item has no `]:` after its IPv6 network")?;
        let protocol = match before {
            "" => PortProtocol::Tcp,
            _ => protocol(before.strip_suffix(':').ok_or("an item has no `:` before its `[`")?)?,
        };
        let net = net(inside).filter(|net| matches!(net, IpNet::V6(_)));
        let net = net.ok_or("an item has in brackets what is not an IPv6 network")?;
        return Ok(ProtocolPort { protocol, net: Some(net), port: port_number(port)? });
    }
    let parts: Vec<&str> = item.split(':').collect();
    match parts[..] {
        [port] => Ok(ProtocolPort { protocol: PortProtocol::Tcp, net: None, port: port_number(port)? }),
        [first, port] => {
            let port = port_number(port)?;
            match net(first) {
                Some(net) => Ok(ProtocolPort { protocol: PortProtocol::Tcp, net: Some(net), port }),
                None => Ok(ProtocolPort { protocol: protocol(first)?, net: None, port }),
            }
        }
        [first, middle, port] => {
            let net = net(middle).ok_or("an item has a network that does not parse")?;
            Ok(ProtocolPort { protocol: protocol(first)?, net: Some(net), port: port_number(port)? })
        }
        _ => Err("an item is not of the form [proto:][net:]port (an IPv6 network needs brackets)".to_owned()),
    }
}

fn protocol(text: &str) -> Result<PortProtocol, String> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(PortProtocol::Tcp),
        "udp" => Ok(PortProtocol::Udp),
        _ => Err("an item's protocol is neither tcp nor udp".to_owned()),
    }
}

fn port_number(text: &str) -> Result<u16, String> {
    digits(text).ok_or_else(|| "an item's port is not a port".to_owned())
}

/// Parses `n` or `n:m`.
pub(super) fn port_range(text: &str) -> Result<PortRange, String> {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    match (digits(first), digits(last)) {
        (Some(first), Some(last)) if first <= last => Ok(PortRange { first, last }),
        _ => Err("not a port or a range of ports, first:last".to_owned()),
    }
}

pub(super) fn port_ranges(text: &str) -> Result<Value, String> {
    items(text).map(port_range).collect::<Result<_, _>>().map(Value::PortRanges)
}

/// Parses `key=value` items; blanks before a key are dropped, the value is taken as it is.
pub(super) fn pairs(text: &str) -> Result<BTreeMap<String, String>, String> {
    text.split(',')
        .map(str::trim_start)
        .filter(|item| !item.is_empty())
        .map(|item| match item.split_once('=') {
            Some((key, value)) if of(key, "_") => Ok((key.to_owned(), value.to_owned())),
            _ => Err("an item is not of the form key=value".to_owned()),
        })
        .collect()
}

pub(super) fn durations(text: &str) -> Result<Value, String> {
    pairs(text)?
        .into_iter()
        .map(|(key, value)| match duration(value.trim()) {
            Some(duration) => Ok((key, duration)),
            None => Err("an item's value is not a duration such as 1m30s".to_owned()),
        })
        .collect::<Result<_, _>>()
        .map(Value::Durations)
}

/// Parses a sequence of numbers with units, `1h2m3s4ms`; `0` needs none.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|end| *end > 0)?;
        let (number, tail) = rest.split_at_checked(number_end)?;
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_end)?;
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(total).ok()
}

/// Parses one `n-m` with 1 ≤ n ≤ m ≤ 250.
pub(super) fn table_range(text: &str) -> Result<Value, String> {
    let range = text.split_once('-').and_then(|(first, last)| Some((digits::<u32>(first)?, digits::<u32>(last)?)));
    match range {
        Some((first, last)) if first >= 1 && first <= last && last <= 250 => Ok(Value::Tables(vec![(first, last)])),
        Some(_) => Err("not between 1 and 250".to_owned()),
        None => Err("not of the form first-last".to_owned()),
    }
}

/// Parses every `n-m` in the text, whatever is around them.
pub(super) fn table_ranges(text: &str) -> Result<Value, String> {
    let mut ranges = Vec::new();
    let mut total: u64 = 0;
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('-') {
        let first = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (last, tail) = after.split_at_checked(end).unwrap_or((after, ""));
        if first.is_empty() || last.is_empty() {
            rest = after;
            continue;
        }
        let too_much = || "a number is more than 4294967295".to_owned();
        let first: u32 = digits(first).ok_or_else(too_much)?;
        let last: u32 = digits(last).ok_or_else(too_much)?;
        if first == 0 {
            return Err("tables count from 1".to_owned());
        }
        let size = last.checked_sub(first).ok_or("a range's last is below the first")?;
        total += u64::from(size) + 1;
        ranges.push((first, last));
        rest = tail;
    }
    if ranges.is_empty() {
        return Err("no range of the form first-last".to_owned());
    }
    if total > MOST_TABLES {
        return Err("more than 65535 tables in total".to_owned());
    }
    Ok(Value::Tables(ranges))
}

/// Parses etcd URLs (operations.md 2.5 rule 8) and normalises each to end in `/`.
pub(super) fn endpoints(text: &str) -> Result<Value, String> {
    let mut endpoints = Vec::new();
    let mut scheme = None;
    for item in items(text) {
        let (this, rest) = match (strip_scheme(item, "http://"), strip_scheme(item, "https://")) {
            (Some(rest), _) => ("http", rest),
            (_, Some(rest)) => ("https", rest),
            (None, None) => return Err("an endpoint starts with neither http:// nor https://".to_owned()),
        };
        if rest.contains('@') {
            return Err("an endpoint has a user name or password".to_owned());
        }
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '?', '#', ' ']) {
            return Err("an endpoint has more than scheme, host and port".to_owned());
        }
        let (host, port) = authority.rsplit_once(':').ok_or("an endpoint has no port")?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return Err("an endpoint has no host".to_owned());
        }
        digits::<u16>(port).ok_or("an endpoint has no port")?;
        if *scheme.get_or_insert(this) != this {
            return Err("the endpoints are not all of the same scheme".to_owned());
        }
        endpoints.push(format!("{this}://{authority}/"));
    }
    if endpoints.is_empty() {
        return Err("no endpoint in the list".to_owned());
    }
    Ok(Value::List(endpoints))
}

fn strip_scheme<'a>(text: &'a str, scheme: &str) -> Option<&'a str> {
    let (head, rest) = text.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// The items of a comma list, trimmed, without the empty ones.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// Parses a number that consists of digits only.
fn digits<N: std::str::FromStr>(text: &str) -> Option<N> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}
