//! Policies and rules of profiles as compact records.
//!
//! Fed with the values of the datastore by `active` and `profiles`, which keep the handles; read when a
//! policy or profile becomes active. Most never do: a host has the policies of the whole cluster and
//! enforces a few.
//!
//! A record holds no text that recurs and no text that would have to be parsed again. Its selectors are
//! in one pool, where each exists once however many policies and rules use it; names (tiers, ports,
//! protocols, services) are numbers of [`Names`].
//!
//! Laws: *read(store(value)) = value*; while they are stored, *records are equal exactly if their values
//! are* (floating point numbers by their bits), so that early cut-off compares bytes (policy.md A-7).

mod rules;

use std::sync::Arc;

use model::{Name, Policy, ProfileRules, Rule, Selector};

use crate::kit::{Bytes, Interner};
use crate::names::Names;
use rules::{Reader, Writer};

/// What an endpoint sees of a policy: all but its rules.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outline {
    pub(crate) tier: Name,
    pub(crate) order: Option<f64>,
    pub(crate) original_selector: Name,
    pub(crate) ingress: bool,
    pub(crate) egress: bool,
    pub(crate) do_not_track: bool,
    pub(crate) pre_dnat: bool,
    pub(crate) apply_on_forward: bool,
}

#[cfg(test)]
impl Outline {
    pub(crate) fn of(policy: &Policy) -> Self {
        Self {
            tier: Name::clone(&policy.tier),
            order: policy.order,
            original_selector: Name::clone(&policy.original_selector),
            ingress: policy.ingress,
            egress: policy.egress,
            do_not_track: policy.do_not_track,
            pre_dnat: policy.pre_dnat,
            apply_on_forward: policy.apply_on_forward,
        }
    }
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Records {
    selectors: Interner<Arc<Selector>>,
    bytes: Bytes,
    writer: Writer,
}

/// Stands for the rules of a profile that has none.
const NO_RULES: u32 = u32::MAX;

const INGRESS: u8 = 1;
const EGRESS: u8 = 2;
const DO_NOT_TRACK: u8 = 4;
const PRE_DNAT: u8 = 8;
const APPLY_ON_FORWARD: u8 = 16;
const ALWAYS_NEEDED: u8 = 32;
const HAS_ORDER: u8 = 64;
/// The original selector is not the text of the selector.
const HAS_TEXT: u8 = 128;

/// The parts of a policy's record.
#[derive(Clone, Copy, Debug)]
struct Header<'a> {
    flags: u8,
    tier: u32,
    selector: u32,
    order: &'a [u8],
    text: &'a [u8],
    rules: &'a [u8],
}

impl Records {
    /// Stores a policy and returns the handle of its record.
    pub(crate) fn store_policy(&mut self, names: &mut Names, policy: &Policy) -> u32 {
        let Self { selectors, bytes, writer } = self;
        let Policy {
            tier,
            order,
            selector,
            original_selector,
            ingress,
            egress,
            do_not_track,
            pre_dnat,
            apply_on_forward,
            always_needed,
            inbound,
            outbound,
        } = policy;
        let has_text = selector.canonical() != **original_selector;
        let flags = [
            (INGRESS, *ingress),
            (EGRESS, *egress),
            (DO_NOT_TRACK, *do_not_track),
            (PRE_DNAT, *pre_dnat),
            (APPLY_ON_FORWARD, *apply_on_forward),
            (ALWAYS_NEEDED, *always_needed),
            (HAS_ORDER, order.is_some()),
            (HAS_TEXT, has_text),
        ];
        writer.byte(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag).sum());
        writer.number(names.acquire(tier));
        writer.number(selectors.acquire_ref(selector.as_ref(), |_| Arc::clone(selector)).0);
        if let Some(order) = order {
            writer.raw(&order.to_bits().to_le_bytes());
        }
        if has_text {
            writer.text(original_selector);
        }
        bytes.insert(writer.finish(names, selectors, inbound, outbound))
    }

    /// Stores the rules of a profile and returns the handle of their record.
    pub(crate) fn store_rules(&mut self, names: &mut Names, rules: &ProfileRules) -> u32 {
        let ProfileRules { inbound, outbound } = rules;
        if inbound.is_empty() && outbound.is_empty() {
            return NO_RULES;
        }
        let Self { selectors, bytes, writer } = self;
        bytes.insert(writer.finish(names, selectors, inbound, outbound))
    }

    /// Forgets the record of a policy, and what nothing else refers to.
    pub(crate) fn discard_policy(&mut self, names: &mut Names, record: u32) {
        if let Some(header) = self.header(record) {
            let Header { tier, selector, .. } = header;
            let used = Reader::new(header.rules).used();
            names.release(tier);
            self.selectors.release(selector);
            self.release(names, used);
        }
        self.bytes.remove(record);
    }

    /// Forgets the record of a profile's rules.
    pub(crate) fn discard_rules(&mut self, names: &mut Names, record: u32) {
        if record != NO_RULES {
            let used = Reader::new(self.bytes.get(record)).used();
            self.release(names, used);
            self.bytes.remove(record);
        }
    }

    fn release(&mut self, names: &mut Names, used: rules::Used) {
        used.names.into_iter().for_each(|name| names.release(name));
        used.selectors.into_iter().for_each(|selector| drop(self.selectors.release(selector)));
    }

    /// True if two records, of policies or of profiles, say the same.
    pub(crate) fn are_equal(&self, a: u32, b: u32) -> bool {
        a == b || (a != NO_RULES && b != NO_RULES && self.bytes.get(a) == self.bytes.get(b))
    }

    /// True if two policies have the same program; order and direction concern only endpoints.
    pub(crate) fn have_equal_programs(&self, a: u32, b: u32) -> bool {
        const FLAGS: u8 = DO_NOT_TRACK | PRE_DNAT | ALWAYS_NEEDED;
        let part = |header: &Header<'_>| (header.flags & FLAGS, header.tier);
        self.header(a)
            .zip(self.header(b))
            .is_some_and(|(a, b)| part(&a) == part(&b) && self.have_equal_texts(&a, &b) && a.rules == b.rules)
    }

    /// True if two policies have the same original selector.
    fn have_equal_texts(&self, a: &Header<'_>, b: &Header<'_>) -> bool {
        let is_canonical_of = |text: &[u8], selector: u32| {
            self.selectors.get(selector).is_some_and(|selector| selector.canonical().as_bytes() == text)
        };
        match (a.flags & HAS_TEXT != 0, b.flags & HAS_TEXT != 0) {
            (true, true) => a.text == b.text,
            (false, false) => a.selector == b.selector,
            (true, false) => is_canonical_of(a.text, b.selector),
            (false, true) => is_canonical_of(b.text, a.selector),
        }
    }

    /// True if two policies have the same [`Outline`] and selector.
    pub(crate) fn have_equal_outlines(&self, a: u32, b: u32) -> bool {
        let part = |header: &Header<'_>| (header.flags & !ALWAYS_NEEDED, header.tier, header.selector);
        self.header(a)
            .zip(self.header(b))
            .is_some_and(|(a, b)| part(&a) == part(&b) && a.order == b.order && a.text == b.text)
    }

    pub(crate) fn is_always_needed(&self, record: u32) -> bool {
        self.header(record).is_some_and(|header| header.flags & ALWAYS_NEEDED != 0)
    }

    /// The selector of a policy.
    pub(crate) fn selector(&self, record: u32) -> Option<&Arc<Selector>> {
        self.selectors.get(self.header(record)?.selector)
    }

    /// Returns all of a policy but its rules. `like` may be another policy of the same selector, to share
    /// the text with.
    pub(crate) fn outline(&self, names: &Names, record: u32, like: Option<(u32, &Outline)>) -> Option<Outline> {
        let header = self.header(record)?;
        let is = |flag| header.flags & flag != 0;
        let shared =
            like.filter(|(like, _)| self.header(*like).is_some_and(|like| self.have_equal_texts(&like, &header)));
        let original_selector = match shared {
            Some((_, like)) => Name::clone(&like.original_selector),
            None if is(HAS_TEXT) => std::str::from_utf8(header.text).ok()?.into(),
            None => self.selectors.get(header.selector)?.canonical().into(),
        };
        let tier = names.get(header.tier)?;
        let tier =
            like.filter(|(_, like)| &*like.tier == tier).map_or_else(|| tier.into(), |(_, like)| like.tier.clone());
        Some(Outline {
            tier,
            order: header.order.try_into().ok().map(|bits| f64::from_bits(u64::from_le_bytes(bits))),
            original_selector,
            ingress: is(INGRESS),
            egress: is(EGRESS),
            do_not_track: is(DO_NOT_TRACK),
            pre_dnat: is(PRE_DNAT),
            apply_on_forward: is(APPLY_ON_FORWARD),
        })
    }

    /// Returns the rules of a policy: inbound, outbound.
    pub(crate) fn policy_rules(&self, names: &Names, record: u32) -> (Vec<Rule>, Vec<Rule>) {
        self.read(names, self.header(record).map(|header| header.rules))
    }

    /// Returns the rules of a profile.
    pub(crate) fn profile_rules(&self, names: &Names, record: u32) -> ProfileRules {
        if record == NO_RULES {
            return ProfileRules::default();
        }
        let (inbound, outbound) = self.read(names, Some(self.bytes.get(record)));
        ProfileRules { inbound, outbound }
    }

    fn read(&self, names: &Names, rules: Option<&[u8]>) -> (Vec<Rule>, Vec<Rule>) {
        let read = rules.and_then(|rules| Reader::new(rules).rules(names, &self.selectors));
        debug_assert!(read.is_some(), "a record that cannot be read");
        read.unwrap_or_default()
    }

    fn header(&self, record: u32) -> Option<Header<'_>> {
        let mut reader = Reader::new(self.bytes.get(record));
        let flags = reader.byte()?;
        Some(Header {
            flags,
            tier: reader.number()?,
            selector: reader.number()?,
            order: if flags & HAS_ORDER == 0 { &[] } else { reader.take(8)? },
            text: if flags & HAS_TEXT == 0 { &[] } else { reader.bytes()? },
            rules: reader.rest(),
        })
    }

    /// Room for strings beside the records.
    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut Bytes {
        &mut self.bytes
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 2] {
        [("selectors of policies", self.selectors.len()), ("records", self.bytes.len())]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.selectors.is_empty() && self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests;
