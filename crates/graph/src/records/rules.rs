//! The part of a record that holds rules.
//!
//! ```text
//! names used | selectors used | number of inbound rules | inbound rules | outbound rules
//! ```
//!
//! Both lists name each number once, in the order of their first use; rules refer to places in them. So a
//! record knows what it holds without being read, and rules are the same bytes wherever they refer to the
//! same. A policy without rules has no such part.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use model::{Action, EntityMatch, Family, IcmpMatch, Name, Port, PortRange, Protocol, Rule, Selector, ServiceRef};

use crate::kit::{IdMap, Interner};
use crate::names::Names;

const PROTOCOL: u8 = 1 << 5;
const NOT_PROTOCOL: u8 = 1 << 6;
const ANNOTATIONS: u8 = 1 << 7;
const HAS_HTTP: u8 = 1 << 4;

const ICMP: u8 = 1;
const ICMP_CODE: u8 = 2;
const NOT_ICMP: u8 = 4;
const NOT_ICMP_CODE: u8 = 8;
const SOURCE: u8 = 16;
const DESTINATION: u8 = 32;

const NETS: u8 = 1;
const NOT_NETS: u8 = 2;
const SELECTOR: u8 = 4;
const NOT_SELECTOR: u8 = 8;
const PORTS: u8 = 16;
const NOT_PORTS: u8 = 32;
const SERVICE: u8 = 64;

const ONE_PORT: u8 = 0;
const PORT_RANGE: u8 = 1;
const NAMED_PORT: u8 = 2;

/// Prefix lengths of IPv6 follow those of IPv4.
const FIRST_V6: u8 = 33;

const ACTIONS: [Action; 4] = [Action::Allow, Action::Deny, Action::Log, Action::Pass];

/// Writes one record after the other into the same buffers.
#[derive(Debug, Default)]
pub(super) struct Writer {
    out: Vec<u8>,
    rules: Vec<u8>,
    names: Places,
    selectors: Places,
    record: Vec<u8>,
}

/// Numbers in the order of their first use.
#[derive(Debug, Default)]
struct Places {
    used: Vec<u32>,
    places: IdMap<u32, u32>,
}

impl Places {
    /// Returns the place of a number, and whether it is new.
    fn place(&mut self, id: u32) -> (u32, bool) {
        let next = self.used.len() as u32;
        let place = *self.places.entry(id).or_insert(next);
        if place == next {
            self.used.push(id);
        }
        (place, place == next)
    }

    fn clear(&mut self) {
        self.used.clear();
        if self.places.len() > 1000 {
            *self = Self::default();
        }
        self.places.clear();
    }
}

/// Where rules are written to.
struct Rules<'a> {
    out: &'a mut Vec<u8>,
    places: (&'a mut Places, &'a mut Places),
    names: &'a mut Names,
    selectors: &'a mut Interner<Arc<Selector>>,
}

impl Writer {
    pub(super) fn byte(&mut self, byte: u8) {
        self.out.push(byte);
    }

    pub(super) fn number(&mut self, number: u32) {
        push_number(&mut self.out, number);
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(super) fn text(&mut self, text: &str) {
        push_text(&mut self.out, text);
    }

    /// Returns what was written and, behind it, the rules; takes a use of everything that these refer to.
    pub(super) fn finish(
        &mut self,
        names: &mut Names,
        selectors: &mut Interner<Arc<Selector>>,
        inbound: &[Rule],
        outbound: &[Rule],
    ) -> &[u8] {
        let Self { out, rules, names: used_names, selectors: used_selectors, record } = self;
        if !inbound.is_empty() || !outbound.is_empty() {
            let mut writer = Rules { out: rules, places: (used_names, used_selectors), names, selectors };
            inbound.iter().chain(outbound).for_each(|rule| writer.rule(rule));
            for places in [&*used_names, &*used_selectors] {
                push_number(out, places.used.len() as u32);
                places.used.iter().for_each(|id| push_number(out, *id));
            }
            push_number(out, inbound.len() as u32);
            out.append(rules);
            used_names.clear();
            used_selectors.clear();
        }
        std::mem::swap(out, record);
        out.clear();
        record
    }
}

impl Rules<'_> {
    fn name(&mut self, name: &Name) -> u32 {
        let id = self.names.acquire(name);
        let (place, new) = self.places.0.place(id);
        if !new {
            self.names.release(id);
        }
        place
    }

    fn selector(&mut self, selector: &Arc<Selector>) {
        let (id, _) = self.selectors.acquire_ref(selector.as_ref(), |_| Arc::clone(selector));
        let (place, new) = self.places.1.place(id);
        if !new {
            self.selectors.release(id);
        }
        push_number(self.out, place);
    }

    fn named(&mut self, name: &Name) {
        let place = self.name(name);
        push_number(self.out, place);
    }

    fn rule(&mut self, rule: &Rule) {
        let Rule { action, family, protocol, not_protocol, icmp, not_icmp, source, destination, has_http, annotations } =
            rule;
        let action = match action {
            Action::Allow => 0,
            Action::Deny => 1,
            Action::Log => 2,
            Action::Pass => 3,
        };
        let family = match family {
            None => 0,
            Some(Family::V4) => 1,
            Some(Family::V6) => 2,
        };
        let first = [
            (HAS_HTTP, *has_http),
            (PROTOCOL, protocol.is_some()),
            (NOT_PROTOCOL, not_protocol.is_some()),
            (ANNOTATIONS, !annotations.is_empty()),
        ];
        let has_code = |icmp: &Option<IcmpMatch>| icmp.is_some_and(|icmp| icmp.code.is_some());
        let nothing = EntityMatch::default();
        let second = [
            (ICMP, icmp.is_some()),
            (ICMP_CODE, has_code(icmp)),
            (NOT_ICMP, not_icmp.is_some()),
            (NOT_ICMP_CODE, has_code(not_icmp)),
            (SOURCE, *source != nothing),
            (DESTINATION, *destination != nothing),
        ];
        self.out.push(action | family << 2 | flags(first));
        self.out.push(flags(second));
        for protocol in [protocol, not_protocol].into_iter().flatten() {
            // Odd numbers are names.
            let number = match protocol {
                Protocol::Number(number) => u32::from(*number) << 1,
                Protocol::Name(name) => self.name(name) << 1 | 1,
            };
            push_number(self.out, number);
        }
        for icmp in [icmp, not_icmp].into_iter().flatten() {
            self.out.push(icmp.kind);
            self.out.extend(icmp.code);
        }
        for entity in [source, destination].into_iter().filter(|entity| **entity != nothing) {
            self.entity(entity);
        }
        if !annotations.is_empty() {
            push_number(self.out, annotations.len() as u32);
            for (key, value) in annotations {
                push_text(self.out, key);
                push_text(self.out, value);
            }
        }
    }

    fn entity(&mut self, entity: &EntityMatch) {
        let EntityMatch { nets, not_nets, selector, not_selector, ports, not_ports, service } = entity;
        self.out.push(flags([
            (NETS, !nets.is_empty()),
            (NOT_NETS, !not_nets.is_empty()),
            (SELECTOR, selector.is_some()),
            (NOT_SELECTOR, not_selector.is_some()),
            (PORTS, !ports.is_empty()),
            (NOT_PORTS, !not_ports.is_empty()),
            (SERVICE, service.is_some()),
        ]));
        for nets in [nets, not_nets].into_iter().filter(|nets| !nets.is_empty()) {
            push_number(self.out, nets.len() as u32);
            for net in nets {
                match net {
                    IpNet::V4(net) => {
                        self.out.push(net.prefix_len());
                        self.out.extend(net.addr().octets());
                    }
                    IpNet::V6(net) => {
                        self.out.push(FIRST_V6 + net.prefix_len());
                        self.out.extend(net.addr().octets());
                    }
                }
            }
        }
        for selector in [selector, not_selector].into_iter().flatten() {
            self.selector(selector);
        }
        for ports in [ports, not_ports].into_iter().filter(|ports| !ports.is_empty()) {
            push_number(self.out, ports.len() as u32);
            ports.iter().for_each(|port| self.port(port));
        }
        if let Some(ServiceRef { namespace, name }) = service {
            self.named(namespace);
            self.named(name);
        }
    }

    fn port(&mut self, port: &Port) {
        match port {
            Port::Range(PortRange { first, last }) if first == last => {
                self.out.push(ONE_PORT);
                self.out.extend(first.to_le_bytes());
            }
            Port::Range(PortRange { first, last }) => {
                self.out.push(PORT_RANGE);
                self.out.extend(first.to_le_bytes());
                self.out.extend(last.to_le_bytes());
            }
            Port::Named(name) => {
                self.out.push(NAMED_PORT);
                self.named(name);
            }
        }
    }
}

fn flags<const N: usize>(flags: [(u8, bool); N]) -> u8 {
    flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag).sum()
}

fn push_number(out: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    push_number(out, text.len() as u32);
    out.extend_from_slice(text.as_bytes());
}

/// What the rules of a record hold a use of.
#[derive(Debug, Default)]
pub(super) struct Used {
    pub(super) names: Vec<u32>,
    pub(super) selectors: Vec<u32>,
}

/// Reads a record. Everything is `None` where the record ends too early, which it does not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

/// What the rules of a record refer to, by place.
struct Context<'a> {
    names: Vec<Name>,
    selectors: Vec<&'a Arc<Selector>>,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(record: &'a [u8]) -> Self {
        Self { rest: record }
    }

    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(part)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn number(&mut self) -> Option<u32> {
        let mut number = 0;
        for place in 0..5 {
            let byte = self.byte()?;
            number |= u32::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    /// Bytes with their number in front.
    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length as usize)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }

    fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.number()?;
        // No more than there can be, whatever the number says.
        let mut list = Vec::with_capacity((count as usize).min(self.rest.len()));
        for _ in 0..count {
            list.push(read(self)?);
        }
        Some(list)
    }

    /// What the rules refer to.
    pub(super) fn used(mut self) -> Used {
        if self.rest.is_empty() {
            return Used::default();
        }
        let names = self.list(Self::number);
        let selectors = self.list(Self::number);
        debug_assert!(selectors.is_some(), "a record that cannot be read");
        Used { names: names.unwrap_or_default(), selectors: selectors.unwrap_or_default() }
    }

    /// The rules: inbound, outbound.
    pub(super) fn rules(
        mut self,
        names: &Names,
        selectors: &Interner<Arc<Selector>>,
    ) -> Option<(Vec<Rule>, Vec<Rule>)> {
        if self.rest.is_empty() {
            return Some(Default::default());
        }
        let context = Context {
            names: self.list(|reader| names.get(reader.number()?).map(Name::from))?,
            selectors: self.list(|reader| selectors.get(reader.number()?))?,
        };
        let inbound = self.list(|reader| reader.rule(&context))?;
        let mut outbound = Vec::new();
        while !self.rest.is_empty() {
            outbound.push(self.rule(&context)?);
        }
        Some((inbound, outbound))
    }

    fn rule(&mut self, context: &Context<'_>) -> Option<Rule> {
        let (first, second) = (self.byte()?, self.byte()?);
        let mut protocol = |flag| match first & flag {
            0 => Some(None),
            _ => self.protocol(context).map(Some),
        };
        let (protocol, not_protocol) = (protocol(PROTOCOL)?, protocol(NOT_PROTOCOL)?);
        let mut icmp = |flag, code| match second & flag {
            0 => Some(None),
            _ => {
                let kind = self.byte()?;
                let code = if second & code == 0 { None } else { Some(self.byte()?) };
                Some(Some(IcmpMatch { kind, code }))
            }
        };
        let (icmp, not_icmp) = (icmp(ICMP, ICMP_CODE)?, icmp(NOT_ICMP, NOT_ICMP_CODE)?);
        let mut entity = |flag| match second & flag {
            0 => Some(EntityMatch::default()),
            _ => self.entity(context),
        };
        Some(Rule {
            action: *ACTIONS.get(usize::from(first & 3))?,
            family: match first >> 2 & 3 {
                0 => None,
                1 => Some(Family::V4),
                _ => Some(Family::V6),
            },
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source: entity(SOURCE)?,
            destination: entity(DESTINATION)?,
            has_http: first & HAS_HTTP != 0,
            annotations: match first & ANNOTATIONS {
                0 => BTreeMap::new(),
                _ => self.list(|reader| Some((reader.text()?, reader.text()?)))?.into_iter().collect(),
            },
        })
    }

    fn name(&mut self, context: &Context<'_>) -> Option<Name> {
        context.names.get(self.number()? as usize).cloned()
    }

    fn protocol(&mut self, context: &Context<'_>) -> Option<Protocol> {
        let number = self.number()?;
        match number & 1 {
            0 => u8::try_from(number >> 1).ok().map(Protocol::Number),
            _ => context.names.get((number >> 1) as usize).cloned().map(Protocol::Name),
        }
    }

    fn entity(&mut self, context: &Context<'_>) -> Option<EntityMatch> {
        let flags = self.byte()?;
        let mut nets = |flag| if flags & flag == 0 { Some(Vec::new()) } else { self.list(Self::net) };
        let (nets, not_nets) = (nets(NETS)?, nets(NOT_NETS)?);
        let mut selector = |flag| match flags & flag {
            0 => Some(None),
            _ => context.selectors.get(self.number()? as usize).map(|selector| Some(Arc::clone(selector))),
        };
        let (selector, not_selector) = (selector(SELECTOR)?, selector(NOT_SELECTOR)?);
        let mut ports = |flag| match flags & flag {
            0 => Some(Vec::new()),
            _ => self.list(|reader| reader.port(context)),
        };
        let (ports, not_ports) = (ports(PORTS)?, ports(NOT_PORTS)?);
        let service = match flags & SERVICE {
            0 => None,
            _ => Some(ServiceRef { namespace: self.name(context)?, name: self.name(context)? }),
        };
        Some(EntityMatch { nets, not_nets, selector, not_selector, ports, not_ports, service })
    }

    fn net(&mut self) -> Option<IpNet> {
        let length = self.byte()?;
        let (address, length) = match length.checked_sub(FIRST_V6) {
            None => (IpAddr::V4(Ipv4Addr::from(self.array::<4>()?)), length),
            Some(length) => (IpAddr::V6(Ipv6Addr::from(self.array::<16>()?)), length),
        };
        IpNet::new(address, length).ok()
    }

    fn port(&mut self, context: &Context<'_>) -> Option<Port> {
        let number = |this: &mut Self| this.array().map(u16::from_le_bytes);
        Some(match self.byte()? {
            ONE_PORT => Port::Range(PortRange::single(number(self)?)),
            PORT_RANGE => Port::Range(PortRange { first: number(self)?, last: number(self)? }),
            _ => Port::Named(self.name(context)?),
        })
    }
}
