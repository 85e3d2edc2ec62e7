//! From events of the store to updates of records (datastore.md 6, S-9, S-10).
//!
//! Fed by [`crate::watch`] and [`crate::ready`], feeds the agent. Keys of other shapes or kinds are skipped silently
//! (K-2). A value that cannot be used gives the absent update at once, together with one log line for each change of
//! the key: the machine reports a change once, so a retry never repeats the line.

use model::convert::{Effect, Options, convert, static_updates};
use model::{ResourceKey, Update};
use tracing::warn;

/// Converts resources one by one; each conversion depends on nothing but the key, the value and the options.
#[derive(Clone, Debug)]
pub(crate) struct Decoder {
    options: Options,
    /// The records that are not stored (K-6), until they are delivered.
    unstored: Vec<Update>,
}

impl Decoder {
    pub(crate) fn new(options: Options) -> Self {
        Self { options, unstored: static_updates() }
    }

    /// Returns, the first time, the records that exist without being stored.
    pub(crate) fn take_unstored(&mut self) -> Vec<Update> {
        std::mem::take(&mut self.unstored)
    }

    /// Appends what the new value of a key, or its absence, means.
    pub(crate) fn decode(&mut self, key: &[u8], value: Option<&[u8]>, out: &mut Vec<Update>) {
        let Some(resource) = ResourceKey::parse(key) else {
            return;
        };
        let converted = convert(&resource, value, &self.options);
        if !converted.complaints.is_empty() {
            let key = String::from_utf8_lossy(key);
            let rejected = converted.complaints.iter().any(|complaint| complaint.effect == Effect::Rejected);
            let reasons: Vec<_> = converted.complaints.iter().map(ToString::to_string).collect();
            let reason = reasons.join("; ");
            if rejected {
                warn!(%key, reason, "invalid resource treated as absent");
            } else {
                warn!(%key, reason, "resource has invalid parts");
            }
        }
        out.extend(converted.updates);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RESOURCES;

    #[test]
    fn keys_that_are_not_read_give_nothing() {
        let keys = [
            "ippools/pool",
            "tiers/",
            "tiers/a/b",
            "networkpolicies/a",
            "workloadendpoints/ns/name/more",
            "unheard-of/x",
            "",
        ];
        for key in keys {
            assert_eq!(decode(key, Some("{}")), [], "{key}");
        }
        let mut out = Vec::new();
        Decoder::new(Options::default()).decode(b"/calico/resources/v3/projectcalico.org/tiers/\xff", None, &mut out);
        assert_eq!(out, []);
    }

    #[test]
    fn what_cannot_be_used_is_absent_like_what_is_deleted() {
        for key in ["tiers/t", "globalnetworkpolicies/p", "networkpolicies/ns/p", "globalnetworksets/s", "profiles/p"] {
            let deleted = decode(key, None);
            assert!(!deleted.is_empty(), "{key}");
            for value in ["", "no json", "[]", "1", r#"{"metadata":3}"#] {
                assert_eq!(decode(key, Some(value)), deleted, "{key} = {value}");
            }
        }
    }

    #[test]
    fn unstored_records_are_delivered_once() {
        let mut decoder = Decoder::new(Options::default());
        assert!(!decoder.take_unstored().is_empty());
        assert!(decoder.take_unstored().is_empty());
    }

    fn decode(key: &str, value: Option<&str>) -> Vec<Update> {
        let mut out = Vec::new();
        let key = format!("{RESOURCES}{key}");
        Decoder::new(Options::default()).decode(key.as_bytes(), value.map(str::as_bytes), &mut out);
        out
    }
}
