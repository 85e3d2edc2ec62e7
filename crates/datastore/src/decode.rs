//! From events of the store to updates of records (datastore.md 6, S-9, S-10).
//!
//! Fed by [`crate::watch`] and [`crate::ready`], feeds the agent. Keys of other shapes or kinds are skipped silently
//! (K-2). A value that cannot be used gives the absent update at once, together with one log line for each change of
//! the key: the machine reports a change once, so a retry never repeats the line.

use std::time::{Duration, Instant};

use model::Update;
use model::convert::{Complaint, Converter, Effect, Options, static_updates};
use tracing::warn;

/// Complaints about one value that a line of the log holds, and the length of each, in characters.
const MOST_COMPLAINTS: usize = 5;
const LONGEST_COMPLAINT: usize = 300;
const LONGEST_KEY: usize = 500;

/// How long what nobody uses any more may stay, if nothing happens that would make it go by itself.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// Converts resources one by one; what each conversion gives depends on nothing but the key, the value and the options.
#[derive(Debug)]
pub(crate) struct Decoder {
    converter: Converter,
    /// Something was decoded since it was last tidy.
    used: bool,
    tidied: Option<Instant>,
    /// The records that are not stored (K-6), until they are delivered.
    unstored: Vec<Update>,
}

impl Decoder {
    pub(crate) fn new(options: Options) -> Self {
        Self { converter: Converter::new(options), used: false, tidied: None, unstored: static_updates() }
    }

    /// Returns, the first time, the records that exist without being stored.
    pub(crate) fn take_unstored(&mut self) -> Vec<Update> {
        std::mem::take(&mut self.unstored)
    }

    /// Appends what the new value of a key, or its absence, means.
    pub(crate) fn decode(&mut self, key: &[u8], value: Option<&[u8]>, out: &mut Vec<Update>) {
        self.used = true;
        let Some(complaints) = self.converter.decode(key, value, out) else {
            return;
        };
        if !complaints.is_empty() {
            let key = shortened(&String::from_utf8_lossy(key), LONGEST_KEY);
            let rejected = complaints.iter().any(|complaint| complaint.effect == Effect::Rejected);
            let reason = summary(&complaints);
            if rejected {
                warn!(key, reason, "invalid resource treated as absent");
            } else {
                warn!(key, reason, "resource has invalid parts");
            }
        }
    }

    /// Forgets texts and selectors that no object has any more, now and then.
    pub(crate) fn tidy(&mut self, now: Instant) {
        let last = *self.tidied.get_or_insert(now);
        if self.used && now.duration_since(last) >= TIDY_EVERY {
            self.converter.pool().sweep();
            self.tidied = Some(now);
            self.used = false;
        }
    }
}

/// Joins what is wrong with a value into one text. A value may hold megabytes of it, so that the text is cut: first
/// what has the value rejected, then the rest, in the order of the value.
fn summary(complaints: &[Complaint]) -> String {
    let (rejecting, other): (Vec<_>, Vec<_>) =
        complaints.iter().partition(|complaint| complaint.effect == Effect::Rejected);
    let said = rejecting.into_iter().chain(other).take(MOST_COMPLAINTS);
    let mut parts: Vec<_> = said.map(|complaint| shortened(&complaint.to_string(), LONGEST_COMPLAINT)).collect();
    let rest = complaints.len().saturating_sub(MOST_COMPLAINTS);
    if rest > 0 {
        parts.push(format!("and {rest} more"));
    }
    parts.join("; ")
}

/// Takes the middle out of a text that is too long: its beginning says where, its end what is wrong.
fn shortened(text: &str, longest: usize) -> String {
    let length = text.chars().count();
    if length <= longest {
        return text.to_owned();
    }
    let (head, tail) = (longest / 2, longest - longest / 2);
    let beginning: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(length - tail).collect();
    format!("{beginning}[{} characters]{end}", length - longest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RESOURCES;

    #[test]
    fn what_is_said_about_a_value_is_short_however_much_is_wrong_with_it() {
        let complaint = |field: &str, reason: String, effect| Complaint { field: field.into(), reason, effect };
        let mut complaints: Vec<_> = (0..40_000)
            .map(|n| complaint(&format!("spec.nets[{n}]"), "no network".into(), Effect::PartIgnored))
            .collect();
        complaints.push(complaint("spec.selector", format!("{} is bad", "(".repeat(1_000_000)), Effect::Rejected));
        let text = summary(&complaints);
        assert!(text.len() < 2000, "{}", text.len());
        assert!(text.starts_with("spec.selector"), "{text}");
        assert!(text.contains("is bad (treated as absent); spec.nets[0]"), "{text}");
        assert!(text.ends_with("and 39996 more"), "{text}");
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(shortened("äöüß", 4), "äöüß");
        assert_eq!(shortened("äöüßäöüß", 4), "äö[4 characters]üß");
    }

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
        for key in [
            "tiers/t",
            "globalnetworkpolicies/p",
            "networkpolicies/ns/p",
            "globalnetworksets/s",
            "hostendpoints/h",
            "profiles/p",
        ] {
            let deleted = decode(key, None);
            assert!(!deleted.is_empty(), "{key}");
            for value in ["", "no json", "[]", "1", r#"{"metadata":3}"#] {
                assert_eq!(decode(key, Some(value)), deleted, "{key} = {value}");
            }
        }
    }

    /// H-10, X-12: a value that cannot be used is a deletion, and what follows it is decoded as ever.
    #[test]
    fn h_10_a_damaged_value_is_a_deletion_and_the_next_one_counts() {
        let good = r#"{"spec": {"order": 5}}"#;
        let seen: Vec<_> = [None, Some("no json"), Some("[]"), Some(good)]
            .into_iter()
            .flat_map(|value| decode("tiers/t", value))
            .map(|update| matches!(update, Update::Tier(_, Some(_))))
            .collect();
        assert_eq!(seen, [false, false, false, true]);
    }

    #[test]
    fn after_everything_was_deleted_nothing_is_kept() {
        let mut decoder = Decoder::new(Options::default());
        let start = Instant::now();
        let mut updates = Vec::new();
        let documents = [
            (
                "workloadendpoints/ns/h-k8s-pod-eth0",
                r#"{"metadata":{"labels":{"a":"b"}},"spec":{"ipNetworks":["10.0.0.1"],"interfaceName":"c"}}"#,
            ),
            ("networkpolicies/ns/p", r#"{"metadata":{"namespace":"ns"},"spec":{"selector":"has(a)"}}"#),
        ];
        for (key, value) in documents {
            decoder.decode(format!("{RESOURCES}{key}").as_bytes(), Some(value.as_bytes()), &mut updates);
        }
        decoder.tidy(start);
        decoder.tidy(start + TIDY_EVERY);
        assert!(!decoder.converter.pool().is_empty(), "the objects have them");
        for (key, _) in documents {
            decoder.decode(format!("{RESOURCES}{key}").as_bytes(), None, &mut updates);
        }
        drop(updates);
        decoder.tidy(start + TIDY_EVERY + TIDY_EVERY / 2);
        assert!(!decoder.converter.pool().is_empty(), "not yet");
        decoder.tidy(start + 2 * TIDY_EVERY);
        assert!(decoder.converter.pool().is_empty());
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
