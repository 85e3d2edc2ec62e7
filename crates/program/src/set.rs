//! IP sets: names, kinds, members.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use model::Family;

/// Name of a kernel set: 1 to 31 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetName(Arc<str>);

impl SetName {
    /// Returns `None` for a name that the kernel would not take.
    pub fn new(name: &str) -> Option<Self> {
        let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
        (!name.is_empty() && name.len() <= model::names::MAX_SET_NAME && plain).then(|| Self(name.into()))
    }

    /// Takes a name that is known to be good, for instance a word of the program; what [`Self::new`]
    /// would refuse in it becomes `_`, and it is cut. Text from outside goes through [`Self::new`].
    pub fn fixed(name: &str) -> Self {
        Self::new(name).unwrap_or_else(|| {
            let plain = |c: char| c.is_ascii_graphic() && c != '"';
            let cut = name.chars().take(model::names::MAX_SET_NAME);
            let cut: String = cut.map(|c| if plain(c) { c } else { '_' }).collect();
            Self(if cut.is_empty() { "_".into() } else { cut.into() })
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a set holds (netfilter.md 17.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetKind {
    /// `hash:ip`
    Address,
    /// `hash:net`
    Net,
    /// `hash:ip,port`
    AddressPort,
}

/// A set without its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetSpec {
    pub name: SetName,
    pub family: Family,
    pub kind: SetKind,
    /// `maxelem`.
    pub max_members: u32,
}

/// A member of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    Address(IpAddr),
    /// Host bits clear; never of length 0, which the kernel refuses.
    Net(IpNet),
    AddressPort {
        address: IpAddr,
        protocol: u8,
        port: u16,
    },
}

impl Member {
    pub const fn family(&self) -> Family {
        match self {
            Self::Address(IpAddr::V4(_))
            | Self::Net(IpNet::V4(_))
            | Self::AddressPort { address: IpAddr::V4(_), .. } => Family::V4,
            Self::Address(IpAddr::V6(_))
            | Self::Net(IpNet::V6(_))
            | Self::AddressPort { address: IpAddr::V6(_), .. } => Family::V6,
        }
    }
}
