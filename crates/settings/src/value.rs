//! What a raw text turns into once it is parsed as its kind.
//!
//! Fed by [`crate::kind`], read by the setters of [`crate::params`]. An accessor that does not fit
//! the value is a mistake in the table: it fails in tests and reads as the zero value in production.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use model::PortRange;

/// A parsed value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Not set, or set to `none`: reads as the zero value of every type (operations.md 2.2).
    Unset,
    Flag(bool),
    Number(i64),
    /// A time in seconds, always finite; zero and less usually mean "off".
    Seconds(f64),
    Text(String),
    List(Vec<String>),
    Address(IpAddr),
    Nets(Vec<IpNet>),
    Ports(Vec<ProtocolPort>),
    PortRanges(Vec<PortRange>),
    Pairs(BTreeMap<String, String>),
    Durations(BTreeMap<String, Duration>),
    Rate(LogRate),
    /// First and last number of each range of routing tables.
    Tables(Vec<(u32, u32)>),
}

/// A port that stays open whatever policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolPort {
    pub protocol: PortProtocol,
    /// Peers that it is open to; all if absent.
    pub net: Option<IpNet>,
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortProtocol {
    Tcp,
    Udp,
}

/// How often a rule may log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogRate {
    /// 1 to 9999.
    pub count: u32,
    pub unit: RateUnit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateUnit {
    Second,
    Minute,
    Hour,
    Day,
}

/// Longest time that a parameter can ask for; anything longer means the same.
const LONGEST: f64 = 1e9;

impl Value {
    pub fn flag(&self) -> bool {
        if let Self::Flag(flag) = self { *flag } else { self.mismatch(false) }
    }

    /// Returns a flag that knows a third state, "not set".
    pub fn optional_flag(&self) -> Option<bool> {
        if let Self::Flag(flag) = self { Some(*flag) } else { self.mismatch(None) }
    }

    /// Returns a number; one that does not fit its target is cut to the nearest that does. The
    /// ranges of the table make that impossible for all but the unbounded kinds.
    pub fn number<N: TryFrom<i64> + Limits>(&self) -> N {
        let number = if let Self::Number(number) = self { *number } else { self.mismatch(0) };
        N::try_from(number).unwrap_or(if number < 0 { N::LEAST } else { N::MOST })
    }

    /// Returns a time, or `None` for zero and less.
    pub fn duration(&self) -> Option<Duration> {
        let seconds = if let Self::Seconds(seconds) = self { *seconds } else { self.mismatch(0.0) };
        if seconds > 0.0 { Duration::try_from_secs_f64(seconds.min(LONGEST)).ok() } else { None }
    }

    pub fn text(&self) -> &str {
        if let Self::Text(text) = self { text } else { self.mismatch("") }
    }

    pub fn list(&self) -> &[String] {
        if let Self::List(list) = self { list } else { self.mismatch(&[]) }
    }

    pub fn ports(&self) -> &[ProtocolPort] {
        if let Self::Ports(ports) = self { ports } else { self.mismatch(&[]) }
    }

    pub fn port_ranges(&self) -> &[PortRange] {
        if let Self::PortRanges(ranges) = self { ranges } else { self.mismatch(&[]) }
    }

    pub fn pairs(&self) -> BTreeMap<String, String> {
        if let Self::Pairs(pairs) = self { pairs.clone() } else { self.mismatch(BTreeMap::new()) }
    }

    pub fn rate(&self) -> Option<LogRate> {
        if let Self::Rate(rate) = self { Some(*rate) } else { self.mismatch(None) }
    }

    /// The zero value: right for [`Self::Unset`], a mistake of the table for everything else.
    fn mismatch<T>(&self, zero: T) -> T {
        debug_assert!(matches!(self, Self::Unset), "{self:?} read as another type");
        zero
    }
}

/// The least and most of an integer type, for [`Value::number`].
pub trait Limits {
    const LEAST: Self;
    const MOST: Self;
}

macro_rules! limits {
    ($($int:ty),*) => { $(impl Limits for $int {
        const LEAST: Self = Self::MIN;
        const MOST: Self = Self::MAX;
    })* };
}

limits!(u8, u16, u32, i64);

/// The text in which the parameter could be written again.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unset => f.write_str("none"),
            Self::Flag(flag) => flag.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Seconds(seconds) => seconds.fmt(f),
            Self::Text(text) => f.write_str(text),
            Self::List(list) => join(f, list),
            Self::Address(address) => address.fmt(f),
            Self::Nets(nets) => join(f, nets),
            Self::Ports(ports) => join(f, ports),
            Self::PortRanges(ranges) => join(f, ranges.iter().map(|range| format!("{}:{}", range.first, range.last))),
            Self::Pairs(pairs) => join(f, pairs.iter().map(|(key, value)| format!("{key}={value}"))),
            Self::Durations(pairs) => {
                join(f, pairs.iter().map(|(key, value)| format!("{key}={}s", value.as_secs_f64())))
            }
            Self::Rate(rate) => rate.fmt(f),
            Self::Tables(ranges) => join(f, ranges.iter().map(|(first, last)| format!("{first}-{last}"))),
        }
    }
}

impl fmt::Display for ProtocolPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            PortProtocol::Tcp => "tcp",
            PortProtocol::Udp => "udp",
        };
        match self.net {
            None => write!(f, "{protocol}:{}", self.port),
            Some(IpNet::V4(net)) => write!(f, "{protocol}:{net}:{}", self.port),
            Some(IpNet::V6(net)) => write!(f, "{protocol}:[{net}]:{}", self.port),
        }
    }
}

impl fmt::Display for LogRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            RateUnit::Second => "second",
            RateUnit::Minute => "minute",
            RateUnit::Hour => "hour",
            RateUnit::Day => "day",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

fn join<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: impl IntoIterator<Item = T>) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(",")?;
        }
        item.fmt(f)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unset_value_reads_as_the_zero_of_every_type() {
        let unset = Value::Unset;
        assert!(!unset.flag());
        assert_eq!(unset.optional_flag(), None);
        assert_eq!(unset.number::<u16>(), 0);
        assert_eq!(unset.duration(), None);
        assert_eq!(unset.text(), "");
        assert!(unset.list().is_empty() && unset.ports().is_empty() && unset.port_ranges().is_empty());
        assert_eq!(unset.rate(), None);
    }

    #[test]
    fn numbers_and_times_stay_inside_what_the_program_can_hold() {
        assert_eq!(Value::Number(-1).number::<u32>(), 0);
        assert_eq!(Value::Number(70_000).number::<u16>(), u16::MAX);
        assert_eq!(Value::Seconds(1.5).duration(), Some(Duration::from_millis(1500)));
        assert_eq!(Value::Seconds(0.0).duration(), None);
        assert_eq!(Value::Seconds(-3.0).duration(), None);
        assert_eq!(Value::Seconds(1e300).duration(), Some(Duration::from_secs(1_000_000_000)));
    }
}
