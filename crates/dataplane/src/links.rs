//! The link monitor: the kernel's interfaces as a source of updates (host.md 2).
//!
//! Fed by the kernel's link messages; feeds whoever receives [`LinkEvent`]s, which turns them into
//! updates of the calculation graph. All interfaces are reported.
//!
//! It subscribes first, then lists, then follows; lists again at every refresh, after messages were lost
//! and after the connection ended. A list counts only if the kernel said that it is complete: an
//! interface missing from half a list would lose its routes.

mod track;

use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use model::{LinkState, Name};
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::AsyncSocket as _;
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval_at, sleep_until};

use crate::clock;
use crate::error::DriverError;
use crate::netlink::{self, Channel, DumpEnd, HEADER_LENGTH, NLM_F_DUMP, NLM_F_REQUEST};
use crate::options::Options;
use track::{Seen, Tracker};

/// Room for bursts of messages (crates.md N3).
const RECEIVE_BUFFER: usize = 8 << 20;
/// Attempts to get a complete list.
const LISTINGS: u32 = 3;
/// Pause before a connection that ended is opened again.
const REOPEN: Duration = Duration::from_millis(100);

const RTM_GETLINK: u16 = 18;
const IFLA_IFNAME: u16 = 3;
const IFF_RUNNING: u32 = 0x40;
/// Length of `struct ifinfomsg`.
const LINK_LENGTH: usize = 16;

/// What the monitor reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// State of an interface; `None`: there is none of this name.
    Changed(Name, Option<LinkState>),
    /// Everything that exists has been reported. Repeated after every list; the first one matters.
    InSync,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct LinkMonitor {
    refresh: Option<Duration>,
    timeout: Duration,
}

/// Why following the kernel's messages ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Nobody listens any more.
    Closed,
    /// The connection to the kernel is gone.
    Disconnected,
}

impl LinkMonitor {
    /// Allocates; nothing is opened before [`Self::run`].
    pub fn new(options: &Options) -> Self {
        Self { refresh: options.link_refresh, timeout: options.netlink_timeout }
    }

    /// Reports all interfaces, then [`LinkEvent::InSync`], then every change, until `out` is closed.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the subscription or does not give a complete list; the process should end
    /// then, as without this nothing is known of the interfaces (host.md 2.2, 6).
    pub async fn run(self, out: mpsc::Sender<LinkEvent>) -> Result<(), DriverError> {
        let mut tracker = Tracker::default();
        let mut first = true;
        loop {
            match self.follow(&mut tracker, first, &out).await? {
                Ended::Closed => return Ok(()),
                Ended::Disconnected => {
                    tracing::warn!("the kernel's link messages ended; subscribing again");
                    tokio::time::sleep(REOPEN).await;
                }
            }
            first = false;
        }
    }

    /// One connection, from subscription to end.
    async fn follow(
        &self,
        tracker: &mut Tracker,
        first: bool,
        out: &mpsc::Sender<LinkEvent>,
    ) -> Result<Ended, DriverError> {
        let subscribed = rtnetlink::new_multicast_connection(&[MulticastGroup::Link]);
        let (mut connection, _handle, messages) =
            subscribed.map_err(|source| failed("subscribe to link messages", source))?;
        netlink::force_receive_buffer(connection.socket_mut().socket_mut(), RECEIVE_BUFFER);
        let mut messages = pin!(messages);
        // Ends with this function, whichever way that ends.
        let mut connection = pin!(connection);

        // Messages were missed between an earlier connection and this one.
        let mut list = Some(!first);
        let mut refresh = self.refresh.map(|period| {
            let mut refresh = interval_at(tokio::time::Instant::now() + period, period);
            refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
            refresh
        });
        let mut events = Vec::new();
        loop {
            let listed = list.is_some();
            if let Some(doubtful) = list.take() {
                let links = list_links(self.timeout).map_err(|source| failed("list links", source))?;
                tracker.list(clock::now(), links, doubtful, &mut events);
            }
            tracker.tick(clock::now(), &mut events);
            if listed {
                events.push(LinkEvent::InSync);
            }
            for event in events.drain(..) {
                if out.send(event).await.is_err() {
                    return Ok(Ended::Closed);
                }
            }
            let timeout = tracker.next_timeout();
            tokio::select! {
                () = &mut connection => return Ok(Ended::Disconnected),
                () = out.closed() => return Ok(Ended::Closed),
                message = messages.next() => match message {
                    None => return Ok(Ended::Disconnected),
                    Some((message, _)) => {
                        // Acknowledgements and the like are not sent to subscribers.
                        if let NetlinkPayload::Overrun(_) = message.payload {
                            tracing::warn!("link messages were lost; listing all links");
                            list = Some(true);
                        } else if let NetlinkPayload::InnerMessage(message) = message.payload
                            && let Some((index, seen)) = understand(&message)
                        {
                            tracker.see(clock::now(), index, seen, &mut events);
                        }
                    }
                },
                () = until(timeout) => (),
                () = tick(refresh.as_mut()) => list = Some(false),
            }
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

async fn tick(interval: Option<&mut tokio::time::Interval>) {
    match interval {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}

fn failed(request: &str, source: io::Error) -> DriverError {
    DriverError::Netlink { request: request.to_owned(), source }
}

/// Returns what a message says about an interface.
fn understand(message: &RouteNetlinkMessage) -> Option<(u32, Seen)> {
    if let RouteNetlinkMessage::DelLink(link) = message {
        return is_link(link).then_some((link.header.index, None));
    }
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    let name = link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute { Some(Name::from(name.as_str())) } else { None }
    })?;
    is_link(link).then(|| (link.header.index, Some((name, link.header.flags.contains(LinkFlags::Running)))))
}

/// A bridge speaks of its ports in messages of its own family: there, a deletion means that the
/// interface left the bridge.
fn is_link(link: &LinkMessage) -> bool {
    link.header.interface_family == AddressFamily::Unspec && link.header.index != 0
}

/// Returns index, name and state of all interfaces.
fn list_links(timeout: Duration) -> io::Result<Vec<(u32, Name, bool)>> {
    let mut channel = Channel::new(NETLINK_ROUTE, timeout, false);
    for _ in 0..LISTINGS {
        let sequence = channel.sequences(1);
        let mut request = Vec::with_capacity(HEADER_LENGTH + LINK_LENGTH);
        netlink::start_message(&mut request, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, sequence);
        request.resize(HEADER_LENGTH + LINK_LENGTH, 0);
        netlink::finish_message(&mut request);
        let mut links = Vec::new();
        let mut understood = true;
        match channel.dump(&request, sequence, |payload| match parse_link(payload) {
            Some(link) => links.push(link),
            None => understood = false,
        })? {
            DumpEnd::Complete if understood => return Ok(links),
            DumpEnd::Complete => return Err(io::Error::new(io::ErrorKind::InvalidData, "malformed link message")),
            DumpEnd::Interrupted => (),
            DumpEnd::Refused(code) if code == nix::libc::EINTR => (),
            DumpEnd::Refused(code) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
    Err(io::Error::new(io::ErrorKind::Interrupted, "links kept changing while they were listed"))
}

/// Reads a link message of a list. Only what is needed is looked at, so that attributes of exotic
/// interfaces cannot make the list unreadable.
fn parse_link(payload: &[u8]) -> Option<(u32, Name, bool)> {
    let word = |at: usize| Some(u32::from_ne_bytes(*payload.get(at..)?.first_chunk()?));
    let (index, flags) = (word(4)?, word(8)?);
    let name = netlink::attributes(payload.get(LINK_LENGTH..)?)
        .map_while(|attribute| attribute)
        .find_map(|(kind, value)| (kind == IFLA_IFNAME).then_some(value))?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Some((index, String::from_utf8_lossy(name.get(..end)?).into(), flags & IFF_RUNNING != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_leaves_a_bridge_is_not_gone() {
        let mut link = LinkMessage::default();
        link.header.index = 7;
        assert_eq!(understand(&RouteNetlinkMessage::DelLink(link.clone())), Some((7, None)));
        link.header.interface_family = AddressFamily::Bridge;
        assert_eq!(understand(&RouteNetlinkMessage::DelLink(link)), None);
    }

    #[test]
    fn a_listed_link_is_read_and_half_a_one_is_not() {
        let mut payload = vec![0u8; LINK_LENGTH];
        payload[4..8].copy_from_slice(&7u32.to_ne_bytes());
        payload[8..12].copy_from_slice(&(IFF_RUNNING | 1).to_ne_bytes());
        assert_eq!(parse_link(&payload), None);
        payload.extend([9, 0, 3, 0]);
        payload.extend(b"tap1\0\0\0\0");
        assert_eq!(parse_link(&payload), Some((7, "tap1".into(), true)));
        for cut in 0..payload.len() - 4 {
            assert_eq!(parse_link(&payload[..cut]), None, "{cut}");
        }
    }
}
