//! Proves that packets see our rules (U6.c).
//!
//! Fed by the apply loop once everything wanted is in force for the first time. Rules may be where no packet comes
//! by: in the variant that the kernel uses last or never, behind somebody else's verdict, in another network
//! namespace. Nothing but packets tell. Some of each family go through a veth pair that exists for a moment and has no
//! address; the counter of our hook in raw PREROUTING must move by as many.
//!
//! Until it does, the loop is not well, the log has one error, and the proof is tried again at growing intervals. Where
//! no pair can be made there is no proof either way, which the log says once.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use futures_util::future::BoxFuture;
use model::Family;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike as _, sendto, socket};
use rtnetlink::{Handle, LinkUnspec, LinkVeth};
use tracing::{error, info};

use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;

/// Names of the pair; the first that no workload interface can have.
const PAIRS: [(&str, &str); 2] = [("felix-canary-a", "felix-canary-b"), ("probe-a-felix", "probe-b-felix")];

/// How long a packet may be on its way.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(10);

/// How many packets one proof sends. All of them have to be counted, so that a few of others that come by at the same
/// time do not pass for ours.
const PACKETS: u64 = 16;

const COMPLAINT: &str = "rules are not in the packet path";

/// What became of a proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Seen,
    NotSeen,
    /// No packet could be sent, or no counter read.
    Unknown(String),
}

/// What is known of each family.
#[derive(Debug, Default)]
pub struct Canary {
    families: BTreeMap<Family, State>,
}

#[derive(Debug)]
enum State {
    /// Proven, or found to be beyond proof.
    Done,
    Failing(Backoff),
}

impl Canary {
    /// Returns whether a proof is due.
    pub fn is_due(&self, family: Family, now: Instant) -> bool {
        match self.families.get(&family) {
            None => true,
            Some(State::Done) => false,
            Some(State::Failing(backoff)) => backoff.ready(now),
        }
    }

    /// When the next proof is due.
    pub fn next_due(&self) -> Option<Instant> {
        let due = |state: &State| match state {
            State::Done => None,
            State::Failing(backoff) => backoff.due(),
        };
        self.families.values().filter_map(due).min()
    }

    /// Takes the outcome of a proof and says what is worth saying.
    pub fn take(&mut self, family: Family, outcome: &Outcome, now: Instant) {
        let failing = matches!(self.families.get(&family), Some(State::Failing(_)));
        match outcome {
            Outcome::Seen => {
                info!(family = family.digit(), "packets pass our rules");
                self.families.insert(family, State::Done);
            }
            Outcome::Unknown(reason) => {
                info!(family = family.digit(), reason, "whether packets pass our rules cannot be tried");
                self.families.insert(family, State::Done);
            }
            Outcome::NotSeen => {
                if !failing {
                    error!(family = family.digit(), "{COMPLAINT}");
                }
                let state = self.families.entry(family).or_insert(State::Done);
                let mut backoff = if let State::Failing(backoff) = state { *backoff } else { Backoff::default() };
                backoff.failed(now);
                *state = State::Failing(backoff);
            }
        }
    }

    /// What is not well.
    pub fn report(&self) -> impl Iterator<Item = DriverReport> {
        let failing = self.families.iter().filter(|(_, state)| matches!(state, State::Failing(_)));
        failing.map(|(family, _)| DriverReport {
            driver: format!("canary/{}", family.digit()),
            waiting: Some(COMPLAINT.to_owned()),
            ..DriverReport::default()
        })
    }
}

/// Reads the number of packets that our hook has seen.
pub type Count<'a> = dyn Fn() -> BoxFuture<'a, io::Result<u64>> + Send + Sync + 'a;

/// Sends packets of `family` through a pair made for it and returns whether `count`, the number of packets that our
/// hook has seen, grew by as many.
pub async fn prove<'a>(family: Family, options: &'a Options, count: &Count<'a>) -> Outcome {
    let prefixes = &options.interface_prefixes;
    let free = |name: &str| !prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
    let Some((from, to)) = PAIRS.into_iter().find(|(from, to)| free(from) && free(to)) else {
        return Outcome::Unknown("workload interfaces may have any name".to_owned());
    };
    let handle = match rtnetlink::new_connection() {
        Ok((connection, handle, _)) => {
            // It ends with the last handle.
            tokio::spawn(connection);
            handle
        }
        Err(error) => return Outcome::Unknown(error.to_string()),
    };
    // A killed predecessor may have left its pair.
    remove(&handle, from).await;
    let outcome = through(&handle, from, to, family, &options.sysctl_root, count).await;
    remove(&handle, from).await;
    outcome.unwrap_or_else(Outcome::Unknown)
}

async fn through(
    handle: &Handle,
    from: &str,
    to: &str,
    family: Family,
    sysctls: &Path,
    count: &Count<'_>,
) -> Result<Outcome, String> {
    let text = |error: rtnetlink::Error| format!("no veth pair: {error}");
    handle.link().add(LinkVeth::new(from, to).build()).execute().await.map_err(text)?;
    quieten(sysctls, from, None);
    quieten(sysctls, to, Some(family));
    for name in [to, from] {
        let index = index_of(handle, name).await.ok_or_else(|| format!("no interface {name}"))?;
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.map_err(text)?;
    }
    let unread = |error: io::Error| format!("no counter: {error}");
    let before = count().await.map_err(unread)?;
    for _ in 0..PACKETS {
        send(family, from, to).map_err(|error| format!("no packet: {error}"))?;
    }
    let mut waited = Duration::ZERO;
    loop {
        if count().await.map_err(unread)? >= before + PACKETS {
            return Ok(Outcome::Seen);
        }
        if waited >= PATIENCE {
            return Ok(Outcome::NotSeen);
        }
        tokio::time::sleep(PAUSE).await;
        waited += PAUSE;
    }
}

/// Keeps the kernel from giving the interface addresses and from saying anything on it by itself. Settings that are
/// not there have nothing to be kept from.
fn quieten(root: &Path, interface: &str, receives: Option<Family>) {
    let ipv6 = receives == Some(Family::V6);
    let settings =
        [("addr_gen_mode", "1"), ("accept_ra", "0"), ("autoconf", "0"), ("disable_ipv6", if ipv6 { "0" } else { "1" })];
    for (name, value) in settings {
        std::fs::write(root.join("net/ipv6/conf").join(interface).join(name), value).ok();
    }
}

async fn index_of(handle: &Handle, name: &str) -> Option<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.ok().flatten().map(|link| link.header.index)
}

async fn remove(handle: &Handle, name: &str) {
    if let Some(index) = index_of(handle, name).await
        && let Err(error) = handle.link().del(index).execute().await
    {
        info!(interface = name, %error, "cannot be removed");
    }
}

/// Puts a packet on the wire behind `from`: from nobody to all hosts on this link, for no protocol, and not to be
/// forwarded.
fn send(family: Family, from: &str, to: &str) -> io::Result<()> {
    let (out, source) = link_address(from)?;
    let (_, destination) = link_address(to)?;
    let packet: Vec<u8> = match family {
        Family::V4 => {
            // Version and length, 20 bytes in all, TTL 1, protocol 253 (for experiments), checksum, 0.0.0.0 to 224.0.0.1.
            let mut header = [0x45, 0, 0, 20, 0, 0, 0, 0, 1, 253, 0, 0, 0, 0, 0, 0, 224, 0, 0, 1];
            let [high, low] = checksum(&header).to_be_bytes();
            (header[10], header[11]) = (high, low);
            header.to_vec()
        }
        Family::V6 => {
            // Version, no payload, no next header (59), hop limit 1, :: to ff02::1.
            let mut header = vec![0x60, 0, 0, 0, 0, 0, 59, 1];
            header.extend([0; 16]);
            header.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            header
        }
    };
    let ether_type: [u8; 2] = match family {
        Family::V4 => [0x08, 0x00],
        Family::V6 => [0x86, 0xdd],
    };
    let frame = [&destination[..], &source, &ether_type, &packet].concat();
    // No protocol: nothing is received.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    sendto(socket.as_raw_fd(), &frame, &out, MsgFlags::empty())?;
    Ok(())
}

/// An interface as packet sockets name it, and its hardware address.
fn link_address(name: &str) -> io::Result<(LinkAddr, [u8; 6])> {
    let links = getifaddrs()?.filter(|link| link.interface_name == name).filter_map(|link| link.address);
    let mut links = links.filter(|address| address.family() == Some(AddressFamily::Packet));
    let link = links.next().and_then(|address| address.as_link_addr().copied());
    let address = link.and_then(|link| Some((link, link.addr()?)));
    address.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} has no hardware address")))
}

/// The checksum of an IPv4 header whose own field is 0 (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    });
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // A header whose checksum is known: 0xb861.
        let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(checksum(&header), 0xb861);
    }

    #[test]
    fn a_failed_proof_is_tried_again_until_it_succeeds() {
        let mut canary = Canary::default();
        let now = Instant::now();
        assert!(canary.is_due(Family::V4, now) && canary.next_due().is_none());
        canary.take(Family::V4, &Outcome::NotSeen, now);
        let due = canary.next_due().unwrap();
        assert!(!canary.is_due(Family::V4, now) && canary.is_due(Family::V4, due) && canary.is_due(Family::V6, now));
        canary.take(Family::V4, &Outcome::NotSeen, due);
        assert!(canary.next_due().unwrap() - due > due - now, "longer and longer");
        assert_eq!(canary.report().count(), 1);
        canary.take(Family::V4, &Outcome::Seen, due);
        canary.take(Family::V6, &Outcome::Unknown("no veth".to_owned()), due);
        assert_eq!((canary.report().count(), canary.next_due()), (0, None));
        assert!(!canary.is_due(Family::V4, due) && !canary.is_due(Family::V6, due));
    }
}
