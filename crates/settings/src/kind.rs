//! The kinds of values and the texts that they accept (operations.md 2.6).
//!
//! Fed by [`crate::resolve`] with raw texts, gives [`Value`]s. A text that is refused is refused
//! with a reason that does not repeat the text, so that the caller decides whether to show it.

mod lists;
mod numbers;

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::value::Value;

/// What a parameter accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Flag,
    /// A flag with a third state, "not set".
    OptionalFlag,
    Int {
        least: i64,
        most: i64,
    },
    Seconds,
    Millis,
    OneOf(&'static [&'static str]),
    Text,
    /// Text that can stand in quotes in the input of a program: no quote, no backslash, no control character.
    PlainText,
    /// A path, not checked.
    Path,
    /// A path whose file must exist; the agent checks that.
    ExistingFile,
    /// An executable; the agent checks that.
    Executable,
    Hostname,
    HostAddress,
    Authority,
    /// Interface name prefixes.
    Interfaces,
    /// Interface names and `/regular expressions/`.
    InterfacePatterns,
    /// One interface name, `+` at its end stands for anything.
    InterfaceMatch,
    InterfaceMatches,
    Regexp,
    Ipv4,
    Ipv6,
    Nets,
    Ports,
    PortRange,
    PortRanges,
    MarkMask,
    Pairs,
    Durations,
    Region,
    TableRange,
    TableRanges,
    LogRate,
    Dscp,
    Endpoints,
}

/// Any number.
pub const INT: Kind = Kind::Int { least: i64::MIN, most: i64::MAX };
/// A TCP or UDP port, 0 included.
pub const PORT: Kind = Kind::Int { least: 0, most: 65535 };

/// Longest region name: a DNS label less `openstack-region-`.
const LONGEST_REGION: usize = 46;

impl Kind {
    /// Parses a text that is neither empty nor `none`.
    ///
    /// # Errors
    ///
    /// The reason why the text is not of this kind.
    pub fn parse(&self, text: &str) -> Result<Value, String> {
        match self {
            Self::Flag | Self::OptionalFlag => flag(text),
            Self::Int { least, most } => {
                let number = numbers::integer(text)?;
                if (*least..=*most).contains(&number) {
                    Ok(Value::Number(number))
                } else {
                    Err(format!("not between {least} and {most}"))
                }
            }
            Self::Seconds => numbers::seconds(text).map(Value::Seconds),
            Self::Millis => numbers::seconds(text).map(|millis| Value::Seconds(millis / 1000.0)),
            Self::OneOf(words) => words
                .iter()
                .find(|word| word.eq_ignore_ascii_case(text))
                .map(|word| Value::Text((*word).to_owned()))
                .ok_or_else(|| format!("not one of {}", words.join(", "))),
            Self::Text | Self::Path | Self::ExistingFile | Self::Executable => Ok(Value::Text(text.to_owned())),
            Self::PlainText => {
                let plain = !text.chars().any(|c| c.is_control() || c == '"' || c == '\\');
                check(plain, "text with a double quote, a backslash or a control character").map(|()| own(text))
            }
            Self::Hostname => {
                check(of(text, "_.-"), "only letters, digits, `_`, `.` and `-` make a name").map(|()| own(text))
            }
            Self::HostAddress => {
                check(text.len() <= 64 && of(text, ":._+-"), "not a host name or address of at most 64 characters")
                    .map(|()| own(text))
            }
            Self::Authority => authority(text),
            Self::Interfaces => lists::interfaces(text),
            Self::InterfacePatterns => lists::interface_patterns(text),
            Self::InterfaceMatch => {
                check(lists::is_interface_match(text), "not an interface name of at most 15 characters")
                    .map(|()| own(text))
            }
            Self::InterfaceMatches => lists::interface_matches(text),
            Self::Regexp => regexp(text).map(|()| own(text)),
            Self::Ipv4 => text
                .parse::<Ipv4Addr>()
                .map(|ip| Value::Address(ip.into()))
                .map_err(|_| "not an IPv4 address".to_owned()),
            Self::Ipv6 => text
                .parse::<Ipv6Addr>()
                .map(|ip| Value::Address(ip.into()))
                .map_err(|_| "not an IPv6 address".to_owned()),
            Self::Nets => lists::nets(text),
            Self::Ports => lists::ports(text),
            Self::PortRange => lists::port_range(text).map(|range| Value::PortRanges(vec![range])),
            Self::PortRanges => lists::port_ranges(text),
            Self::MarkMask => numbers::mark_mask(text),
            Self::Pairs => lists::pairs(text).map(Value::Pairs),
            Self::Durations => lists::durations(text),
            Self::Region => region(text),
            Self::TableRange => lists::table_range(text),
            Self::TableRanges => lists::table_ranges(text),
            Self::LogRate => numbers::log_rate(text),
            Self::Dscp => numbers::dscp(text),
            Self::Endpoints => lists::endpoints(text),
        }
    }

    /// Describes what the kind accepts, in words that fit after "accepts".
    pub fn describe(&self) -> String {
        match self {
            Self::Flag => "true or false".to_owned(),
            Self::OptionalFlag => "true or false; by itself neither".to_owned(),
            Self::Int { least: i64::MIN, .. } => "a whole number".to_owned(),
            Self::Int { least, most: i64::MAX } => format!("a whole number of {least} or more"),
            Self::Int { least, most } => format!("a whole number from {least} to {most}"),
            Self::Seconds => "seconds, fractions allowed".to_owned(),
            Self::Millis => "milliseconds, fractions allowed".to_owned(),
            Self::OneOf(words) => format!("one of {}", words.join(", ")),
            Self::Text => "any text".to_owned(),
            Self::PlainText => "text without double quotes, backslashes and control characters".to_owned(),
            Self::Path => "a path".to_owned(),
            Self::ExistingFile => "the path of an existing file".to_owned(),
            Self::Executable => "the path of an executable".to_owned(),
            Self::Hostname => "a name of letters, digits, `_`, `.` and `-`".to_owned(),
            Self::HostAddress => "a host name or address".to_owned(),
            Self::Authority => "host:port".to_owned(),
            Self::Interfaces => "a comma list of interface name prefixes".to_owned(),
            Self::InterfacePatterns => "a comma list of interface names and /regular expressions/".to_owned(),
            Self::InterfaceMatch => "an interface name; a final + stands for anything".to_owned(),
            Self::InterfaceMatches => "a comma list of interface names; a final + stands for anything".to_owned(),
            Self::Regexp => "a regular expression".to_owned(),
            Self::Ipv4 => "an IPv4 address".to_owned(),
            Self::Ipv6 => "an IPv6 address".to_owned(),
            Self::Nets => "a comma list of networks and addresses".to_owned(),
            Self::Ports => "a comma list of [tcp|udp:][net:]port".to_owned(),
            Self::PortRange => "a port or first:last".to_owned(),
            Self::PortRanges => "a comma list of ports and first:last".to_owned(),
            Self::MarkMask => "32 bits, at least two of them set".to_owned(),
            Self::Pairs => "a comma list of key=value".to_owned(),
            Self::Durations => "a comma list of key=duration, such as 1m30s".to_owned(),
            Self::Region => format!("a DNS label of at most {LONGEST_REGION} characters"),
            Self::TableRange => "first-last, between 1 and 250".to_owned(),
            Self::TableRanges => "a list of first-last".to_owned(),
            Self::LogRate => "a number, `/` and second, minute, hour or day".to_owned(),
            Self::Dscp => "0 to 63, or a name such as EF".to_owned(),
            Self::Endpoints => "a comma list of http(s)://host:port".to_owned(),
        }
    }
}

fn flag(text: &str) -> Result<Value, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "y" | "t" => Ok(Value::Flag(true)),
        "false" | "0" | "no" | "n" | "f" => Ok(Value::Flag(false)),
        _ => Err("neither true nor false".to_owned()),
    }
}

fn authority(text: &str) -> Result<Value, String> {
    let valid = text.split_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
    });
    check(valid, "not of the form host:port (for IPv6 literals use EtcdEndpoints)").map(|()| own(text))
}

fn region(text: &str) -> Result<Value, String> {
    let valid = text.len() <= LONGEST_REGION
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    check(valid, "not a DNS label of at most 46 characters").map(|()| own(text))
}

/// Checks the syntax; nothing here matches anything yet.
fn regexp(text: &str) -> Result<(), String> {
    regex_syntax::parse(text).map(|_| ()).map_err(|_| "not a regular expression".to_owned())
}

fn check(valid: bool, reason: &str) -> Result<(), String> {
    if valid { Ok(()) } else { Err(reason.to_owned()) }
}

fn own(text: &str) -> Value {
    Value::Text(text.to_owned())
}

/// True for a text of at least one character, all of them ASCII letters, digits or in `more`.
fn of(text: &str, more: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of operations.md 2.6: kind, text, the value as it prints, or what the refusal says.
    #[allow(clippy::type_complexity, reason = "rows of a table")]
    const CASES: &[(Kind, &str, Result<&str, &str>)] = &[
        (Kind::Flag, "YES", Ok("true")),
        (Kind::Flag, "f", Ok("false")),
        (Kind::Flag, "on", Err("neither true nor false")),
        (Kind::OptionalFlag, "1", Ok("true")),
        (INT, "0x2383", Ok("9091")),
        (INT, "0X10", Ok("16")),
        (INT, "0o17", Ok("15")),
        (INT, "0b101", Ok("5")),
        (INT, "010", Ok("8")),
        (INT, "-5", Ok("-5")),
        (INT, "0x7fff_ffff", Ok("2147483647")),
        (INT, "08", Err("not a whole number")),
        (INT, "1e3", Err("not a whole number")),
        (INT, "1__0", Err("not a whole number")),
        (INT, "99999999999999999999", Err("not a whole number")),
        (PORT, "65536", Err("not between 0 and 65535")),
        (Kind::Seconds, "1.5", Ok("1.5")),
        (Kind::Seconds, "-1", Ok("-1")),
        (Kind::Seconds, "60s", Err("not a number of seconds")),
        (Kind::Seconds, "nan", Err("not a number of seconds")),
        (Kind::Seconds, "inf", Err("not a number of seconds")),
        (Kind::Seconds, "-Infinity", Err("not a number of seconds")),
        (Kind::Millis, "50", Ok("0.05")),
        (Kind::OneOf(&["insert", "append"]), "Insert", Ok("insert")),
        (Kind::OneOf(&["insert", "append"]), "prepend", Err("not one of insert, append")),
        (Kind::PlainText, "%t's log;", Ok("%t's log;")),
        (Kind::PlainText, "a\" -j ACCEPT", Err("double quote")),
        (Kind::PlainText, "a\n-A INPUT", Err("control character")),
        (Kind::Hostname, "Compute-1.example_x", Ok("Compute-1.example_x")),
        (Kind::Hostname, "a b", Err("only letters")),
        (Kind::HostAddress, "::1", Ok("::1")),
        (Kind::HostAddress, "a/b", Err("not a host name")),
        (Kind::Authority, "etcd.example:2379", Ok("etcd.example:2379")),
        (Kind::Authority, "[::1]:2379", Err("use EtcdEndpoints")),
        (Kind::Authority, "http://a:1", Err("use EtcdEndpoints")),
        (Kind::Interfaces, "cali,tap", Ok("cali,tap")),
        (Kind::Interfaces, "cali, tap", Err("not a comma list")),
        (Kind::Interfaces, "cali,", Err("not a comma list")),
        (Kind::Interfaces, "0123456789abcdef", Err("not a comma list")),
        (Kind::InterfacePatterns, "/^veth/,docker0", Ok("/^veth/,docker0")),
        (Kind::InterfacePatterns, "eth0.100", Err("neither an interface name")),
        (Kind::InterfacePatterns, "eth+", Err("neither an interface name")),
        (Kind::InterfacePatterns, "/a b/", Err("neither an interface name")),
        (Kind::InterfacePatterns, "/(/", Err("not a regular expression")),
        (Kind::InterfaceMatch, "eth+", Ok("eth+")),
        (Kind::InterfaceMatch, "a/b", Err("not an interface name")),
        (Kind::InterfaceMatches, "docker+,eth0.1", Ok("docker+,eth0.1")),
        (Kind::Regexp, "^((en|wl)[Pco].*)", Ok("^((en|wl)[Pco].*)")),
        (Kind::Regexp, "a(", Err("not a regular expression")),
        (Kind::Ipv4, "10.0.0.1", Ok("10.0.0.1")),
        (Kind::Ipv4, "fd00::1", Err("not an IPv4 address")),
        (Kind::Ipv6, "fd00::0:1", Ok("fd00::1")),
        (Kind::Ipv6, "10.0.0.1", Err("not an IPv6 address")),
        (Kind::Nets, "10.0.0.1/8, 192.0.2.1,fd00::1", Ok("10.0.0.0/8,192.0.2.1/32,fd00::1/128")),
        (Kind::Nets, "10.0.0.0/33", Err("neither a network nor an address")),
        (Kind::Ports, "22", Ok("tcp:22")),
        (Kind::Ports, "udp:10.0.0.1/8:53, ,TCP:[fd00::/8]:443", Ok("udp:10.0.0.0/8:53,tcp:[fd00::/8]:443")),
        (Kind::Ports, "0", Ok("tcp:0")),
        (Kind::Ports, "[fd00::/8]:1", Ok("tcp:[fd00::/8]:1")),
        (Kind::Ports, "sctp:1", Err("protocol is neither tcp nor udp")),
        (Kind::Ports, "tcp:[fd00::/8]", Err("no `]:`")),
        (Kind::Ports, "tcp:]fd00::/8[:1", Err("no `]:`")),
        (Kind::Ports, "tcp:[10.0.0.0/8]:1", Err("not an IPv6 network")),
        (Kind::Ports, "tcp:65536", Err("not a port")),
        (Kind::Ports, "tcp:1:2:3", Err("not of the form")),
        (Kind::PortRange, "1000:2000", Ok("1000:2000")),
        (Kind::PortRange, "5", Ok("5:5")),
        (Kind::PortRange, "2:1", Err("not a port or a range")),
        (Kind::PortRanges, "30000:32767,80", Ok("30000:32767,80:80")),
        (Kind::PortRanges, "[30000:32767]", Err("not a port or a range")),
        (Kind::MarkMask, "0xffff0000", Ok("4294901760")),
        (Kind::MarkMask, "0x1", Err("fewer than two bits")),
        (Kind::MarkMask, "0x1ffffffff", Err("not a 32-bit number")),
        (Kind::Pairs, "a=1, b= 2,,c=x=y", Ok("a=1,b= 2,c=x=y")),
        (Kind::Pairs, "a", Err("not of the form key=value")),
        (Kind::Pairs, "a-b=1", Err("not of the form key=value")),
        (Kind::Durations, "a=90s,b=1m0.5s", Ok("a=90s,b=60.5s")),
        (Kind::Durations, "a=1h2m3s4ms", Ok("a=3723.004s")),
        (Kind::Durations, "a=90", Err("not a duration")),
        (Kind::Durations, "a=0", Ok("a=0s")),
        (Kind::Region, "europe-1", Ok("europe-1")),
        (Kind::Region, "Europe", Err("not a DNS label")),
        (Kind::Region, "a123456789a123456789a123456789a123456789a123456", Err("not a DNS label")),
        (Kind::TableRange, "1-250", Ok("1-250")),
        (Kind::TableRange, "0-3", Err("not between 1 and 250")),
        (Kind::TableRanges, "1-10,1000-1010", Ok("1-10,1000-1010")),
        (Kind::TableRanges, "about 5-7 or so", Ok("5-7")),
        (Kind::TableRanges, "5", Err("no range")),
        (Kind::TableRanges, "1-65536", Err("more than 65535 tables")),
        (Kind::TableRanges, "7-5", Err("last is below the first")),
        (Kind::TableRanges, "1-4294967296", Err("more than 4294967295")),
        (Kind::LogRate, "10/minute", Ok("10/minute")),
        (Kind::LogRate, "0/minute", Err("not of the form")),
        (Kind::LogRate, "10000/day", Err("not of the form")),
        (Kind::LogRate, "1/week", Err("not of the form")),
        (Kind::Dscp, "EF", Ok("46")),
        (Kind::Dscp, "af11", Ok("10")),
        (Kind::Dscp, "CS1", Ok("8")),
        (Kind::Dscp, "63", Ok("63")),
        (Kind::Dscp, "64", Err("neither 0 to 63")),
        (Kind::Endpoints, "https://a:2379, ,https://[::1]:2379/", Ok("https://a:2379/,https://[::1]:2379/")),
        (Kind::Endpoints, "http://a:1,https://b:1", Err("not all of the same scheme")),
        (Kind::Endpoints, "ftp://a:1", Err("neither http:// nor https://")),
        (Kind::Endpoints, "http://a", Err("no port")),
        (Kind::Endpoints, "http://a:1/path", Err("more than scheme, host and port")),
        (Kind::Endpoints, "http://a:1?x", Err("more than scheme, host and port")),
        (Kind::Endpoints, "https://u:secret@a:1", Err("user name or password")),
        (Kind::Endpoints, " , ", Err("no endpoint")),
    ];

    #[test]
    fn each_kind_accepts_what_the_specification_says_and_nothing_else() {
        for (kind, text, expected) in CASES {
            let got = kind.parse(text).map(|value| value.to_string());
            match (&got, expected) {
                (Ok(value), Ok(expected)) => assert_eq!(value, expected, "{kind:?} {text:?}"),
                (Err(reason), Err(part)) => assert!(reason.contains(part), "{kind:?} {text:?}: {reason}"),
                _ => panic!("{kind:?} {text:?}: got {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn a_refusal_never_repeats_a_credential() {
        let reason = Kind::Endpoints.parse("https://root:hunter2@etcd:2379").unwrap_err();
        assert!(!reason.contains("hunter2") && !reason.contains("root"), "{reason}");
    }
}
