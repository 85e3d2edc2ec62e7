//! Random documents through the reader and through a slow one that walks a tree.
//!
//! The tree is what the slow reader says the semantics are: of a repeated key the last one is in it, `null` and
//! absence are the zero value, a wrong type is nothing.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON gets no further types")]

use proptest::prelude::*;
use serde_json::{Map, Value};

use super::super::endpoint::{EndpointPort, HostEndpointSpec, IpNat, QosControls};
use super::super::policy::{EntityRule, Icmp, IgnoredObject, RuleMetadata, ServiceAccounts, Services};
use super::super::scalars::{NumberOrText, Port, Protocol};
use super::super::*;

/// Reads a field of an object; `None` for a wrong type.
trait Slow: Default {
    fn slow(value: &Value) -> Option<Self>;

    fn field(object: &Map<String, Value>, key: &str) -> Option<Self> {
        match object.get(key) {
            None | Some(Value::Null) => Some(Self::default()),
            Some(value) => Self::slow(value),
        }
    }
}

impl Slow for Text<'static> {
    fn slow(value: &Value) -> Option<Self> {
        value.as_str().map(|text| text.to_owned().into())
    }
}

impl Slow for bool {
    fn slow(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Slow for i64 {
    fn slow(value: &Value) -> Option<Self> {
        value.as_i64()
    }
}

impl Slow for u16 {
    fn slow(value: &Value) -> Option<Self> {
        u16::try_from(value.as_u64()?).ok()
    }
}

impl Slow for f64 {
    fn slow(value: &Value) -> Option<Self> {
        value.as_f64()
    }
}

impl<T: Slow> Slow for Option<T> {
    fn slow(value: &Value) -> Option<Self> {
        T::slow(value).map(Some)
    }
}

impl<T: Slow> Slow for Vec<T> {
    fn slow(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(T::slow).collect()
    }
}

impl Slow for TextMap<'static> {
    fn slow(value: &Value) -> Option<Self> {
        let entry = |(key, value): (&String, &Value)| {
            let value = if value.is_null() { "" } else { value.as_str()? };
            Some((Text::from(key.clone()), Text::from(value.to_owned())))
        };
        value.as_object()?.iter().map(entry).collect::<Option<Vec<_>>>().map(TextMap::from)
    }
}

impl Slow for Protocol<'static> {
    fn slow(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => u8::try_from(number.as_u64()?).ok().map(Self::Number),
            Value::String(text) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(text.parse().map_or_else(|_| Self::Name(text.clone().into()), Self::Number))
            }
            Value::String(text) => Some(Self::Name(text.clone().into())),
            _ => None,
        }
    }
}

impl Default for Port<'_> {
    fn default() -> Self {
        Self::Range(0, 0)
    }
}

impl Slow for Port<'static> {
    fn slow(value: &Value) -> Option<Self> {
        let number =
            |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
        match value {
            Value::Number(number) => u16::try_from(number.as_u64()?).ok().map(|port| Self::Range(port, port)),
            Value::String(text) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                number(text).map(|port| Self::Range(port, port))
            }
            Value::String(text) => match text.split_once(':') {
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    (first <= last).then_some(Self::Range(first, last))
                }
                None => {
                    let good = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
                    ((1..=128).contains(&text.len()) && text.chars().all(good))
                        .then(|| Self::Named(text.clone().into()))
                }
            },
            _ => None,
        }
    }
}

impl Slow for NumberOrText {
    fn slow(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => u8::try_from(number.as_u64()?).ok().map(Self::Number),
            Value::String(text) => Some(Self::Text(text.clone())),
            _ => None,
        }
    }
}

impl Default for NumberOrText {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Slow for IgnoredObject {
    fn slow(value: &Value) -> Option<Self> {
        value.as_object().map(|_| Self)
    }
}

/// Lists the fields of a struct for the slow reader, and for the generator of documents.
macro_rules! fields {
    ($($name:ty: $($key:literal $field:ident $kind:expr,)*;)*) => {$(
        impl Slow for $name {
            fn slow(value: &Value) -> Option<Self> {
                let object = value.as_object()?;
                Some(Self { $($field: Slow::field(object, $key)?,)* })
            }
        }

        impl Described for $name {
            const FIELDS: &'static [(&'static str, Kind)] = &[$(($key, $kind),)*];
        }
    )*};
}

trait Described {
    const FIELDS: &'static [(&'static str, Kind)];
}

/// What a generated value is.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    Bool,
    Int,
    Port16,
    Order,
    Protocol,
    Port,
    Dscp,
    Map,
    Ignored,
    List(&'static Kind),
    Object(&'static [(&'static str, Kind)]),
}

use Kind::{Bool, Dscp, Ignored, Int, List, Object, Order, Port16};

fields! {
    WorkloadEndpointSpec<'static>:
        "serviceAccountName" service_account_name Kind::Text, "ipNetworks" ip_networks List(&Kind::Text),
        "ipNATs" ip_nats List(&Object(IpNat::FIELDS)), "ipv4Gateway" ipv4_gateway Kind::Text,
        "ipv6Gateway" ipv6_gateway Kind::Text, "profiles" profiles List(&Kind::Text),
        "interfaceName" interface_name Kind::Text, "mac" mac Kind::Text,
        "ports" ports List(&Object(EndpointPort::FIELDS)),
        "allowSpoofedSourcePrefixes" allow_spoofed_source_prefixes List(&Kind::Text),
        "qosControls" qos_controls Object(QosControls::FIELDS),;
    HostEndpointSpec<'static>:
        "node" node Kind::Text, "interfaceName" interface_name Kind::Text,
        "expectedIPs" expected_ips List(&Kind::Text), "profiles" profiles List(&Kind::Text),
        "ports" ports List(&Object(EndpointPort::FIELDS)),;
    IpNat<'static>: "internalIP" internal_ip Kind::Text, "externalIP" external_ip Kind::Text,;
    EndpointPort<'static>: "name" name Kind::Text, "protocol" protocol Kind::Protocol, "port" port Port16,;
    QosControls:
        "ingressBandwidth" ingress_bandwidth Int, "ingressBurst" ingress_burst Int,
        "ingressPeakrate" ingress_peakrate Int, "ingressMinburst" ingress_minburst Int,
        "egressBandwidth" egress_bandwidth Int, "egressBurst" egress_burst Int,
        "egressPeakrate" egress_peakrate Int, "egressMinburst" egress_minburst Int,
        "ingressPacketRate" ingress_packet_rate Int, "ingressPacketBurst" ingress_packet_burst Int,
        "egressPacketRate" egress_packet_rate Int, "egressPacketBurst" egress_packet_burst Int,
        "ingressMaxConnections" ingress_max_connections Int, "egressMaxConnections" egress_max_connections Int,
        "dscp" dscp Dscp,;
    NetworkSetSpec<'static>: "nets" nets List(&Kind::Text),;
    TierSpec<'static>: "order" order Order, "defaultAction" default_action Kind::Text,;
    ProfileSpec<'static>:
        "ingress" ingress List(&Object(Rule::FIELDS)), "egress" egress List(&Object(Rule::FIELDS)),
        "labelsToApply" labels_to_apply Kind::Map,;
    PolicySpec<'static>:
        "tier" tier Kind::Text, "order" order Order, "ingress" ingress List(&Object(Rule::FIELDS)),
        "egress" egress List(&Object(Rule::FIELDS)), "selector" selector Kind::Text, "types" types List(&Kind::Text),
        "serviceAccountSelector" service_account_selector Kind::Text,
        "performanceHints" performance_hints List(&Kind::Text), "doNotTrack" do_not_track Bool,
        "preDNAT" pre_dnat Bool, "applyOnForward" apply_on_forward Bool,
        "namespaceSelector" namespace_selector Kind::Text,;
    Rule<'static>:
        "action" action Kind::Text, "ipVersion" ip_version Int, "protocol" protocol Kind::Protocol,
        "notProtocol" not_protocol Kind::Protocol, "icmp" icmp Object(Icmp::FIELDS),
        "notICMP" not_icmp Object(Icmp::FIELDS), "source" source Object(EntityRule::FIELDS),
        "destination" destination Object(EntityRule::FIELDS), "http" http Ignored,
        "metadata" metadata Object(RuleMetadata::FIELDS),;
    Icmp: "type" kind Int, "code" code Int,;
    EntityRule<'static>:
        "nets" nets List(&Kind::Text), "notNets" not_nets List(&Kind::Text), "selector" selector Kind::Text,
        "notSelector" not_selector Kind::Text, "namespaceSelector" namespace_selector Kind::Text,
        "ports" ports List(&Kind::Port), "notPorts" not_ports List(&Kind::Port),
        "serviceAccounts" service_accounts Object(ServiceAccounts::FIELDS),
        "services" services Object(Services::FIELDS),;
    ServiceAccounts<'static>: "names" names List(&Kind::Text), "selector" selector Kind::Text,;
    Services<'static>: "name" name Kind::Text, "namespace" namespace Kind::Text,;
    RuleMetadata<'static>: "annotations" annotations Kind::Map,;
    Meta<'static>:
        "name" name Kind::Text, "namespace" namespace Kind::Text, "labels" labels Kind::Map,
        "annotations" annotations Kind::Map,;
}

fn slow<S: Slow>(text: &str) -> Option<Resource<'static, S>> {
    let tree: Value = serde_json::from_str(text).ok()?;
    let object = tree.as_object()?;
    Some(Resource { metadata: Slow::field(object, "metadata")?, spec: Slow::field(object, "spec")? })
}

/// Writes random documents.
struct Writer {
    state: u64,
    /// Chance of a value of a wrong type, in a thousand.
    wrong: u64,
}

impl Writer {
    fn below(&mut self, n: u64) -> u64 {
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn one_of<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }

    fn text(&mut self) -> &'static str {
        self.one_of(&[
            r#""""#,
            r#""a""#,
            r#""10.0.0.1/32""#,
            r#""has(a)""#,
            r#""a\"b\\c""#,
            r#""\u0000\n\t""#,
            r#""\ud83d\ude00""#,
            r#""ä😀\u00e4""#,
            r#""80""#,
            r#""\u0038\u0030""#,
            r#""tcp""#,
            "\"\u{fffd}\u{202e}\"",
            r#""\/""#,
        ])
    }

    fn anything(&mut self) -> &'static str {
        self.one_of(&[
            "null",
            "true",
            "1",
            "-1",
            "1.5",
            "1e999",
            "99999999999999999999",
            r#""x""#,
            "[]",
            "[null]",
            "[[]]",
            "{}",
            r#"{"a": [1, {"b": null}], "a": 2}"#,
            r#""\ud800""#,
        ])
    }

    fn value(&mut self, kind: Kind) -> String {
        if self.below(1000) < self.wrong {
            return self.anything().to_owned();
        }
        match kind {
            Kind::Text => self.text().to_owned(),
            Kind::Bool => self.one_of(&["true", "false"]).to_owned(),
            Kind::Int => self.one_of(&["0", "-1", "255", "4294967296", "9223372036854775807"]).to_owned(),
            Kind::Port16 => self.one_of(&["0", "80", "65535"]).to_owned(),
            Kind::Order => self.one_of(&["0", "-0.0", "1.5", "1e3", "100", "18446744073709551615"]).to_owned(),
            Kind::Protocol => {
                self.one_of(&["0", "6", "255", r#""TCP""#, r#""17""#, r#""256""#, r#""\u0036""#]).to_owned()
            }
            Kind::Port => self
                .one_of(&["0", "80", r#""80""#, r#""80:90""#, r#""http""#, r#""h\u0074tp""#, r#""\u0038""#])
                .to_owned(),
            Kind::Dscp => self.one_of(&["0", "63", r#""EF""#]).to_owned(),
            Kind::Ignored => self.one_of(&["{}", r#"{"a": 1, "a": null}"#]).to_owned(),
            Kind::Map => {
                let n = self.below(4);
                // Only the last entry may have a wrong type, as nothing overrides it.
                let wrong = std::mem::take(&mut self.wrong);
                let mut entries = Vec::new();
                for i in 0..n {
                    if i + 1 == n {
                        self.wrong = wrong;
                    }
                    let key = self.one_of(&[r#""a""#, r#""\u0061""#, r#""b/c""#, r#""ä""#, r#""""#]);
                    let value = if self.below(5) == 0 { "null".to_owned() } else { self.value(Kind::Text) };
                    entries.push(format!("{key}: {value}"));
                }
                self.wrong = wrong;
                format!("{{{}}}", entries.join(", "))
            }
            Kind::List(of) => {
                let n = self.below(4);
                let entries: Vec<String> = (0..n).map(|_| self.value(*of)).collect();
                format!("[{}]", entries.join(", "))
            }
            Kind::Object(fields) => self.object(fields),
        }
    }

    fn object(&mut self, fields: &[(&str, Kind)]) -> String {
        let mut entries = Vec::new();
        for (key, kind) in fields {
            let key = match self.below(8) {
                // A key may be written with escapes.
                0 => format!("\"\\u{:04x}{}\"", key.as_bytes()[0], &key[1..]),
                _ => format!("{key:?}"),
            };
            match self.below(6) {
                0 | 1 => continue,
                2 => entries.push(format!("{key}: null")),
                3 => {
                    // What is overridden has the right type: a wrong one makes the document unparsable (J-3),
                    // which the tree does not show.
                    let wrong = std::mem::take(&mut self.wrong);
                    entries.push(format!("{key}: {}", self.value(*kind)));
                    self.wrong = wrong;
                    entries.push(format!("{key}: {}", self.value(*kind)));
                }
                _ => entries.push(format!("{key}: {}", self.value(*kind))),
            }
            if self.below(8) == 0 {
                entries
                    .push(format!(r#""unknown": {}"#, self.one_of(&["1", "[{}]", r#"{"spec": {"a": "b"}}"#, "null"])));
            }
        }
        format!("{{{}}}", entries.join(self.one_of(&[",", ", ", " ,\n\t"])))
    }
}

/// Compares random documents of one kind and returns how many were parsed.
macro_rules! documents {
    ($spec:ident, $writer:expr) => {{
        let writer: &mut Writer = $writer;
        let mut n_parsed = 0;
        for _ in 0..20 {
            let text = writer.object(&[("metadata", Object(Meta::FIELDS)), ("spec", Object($spec::FIELDS))]);
            let fast = parse::<$spec<'_>>(&text).ok();
            n_parsed += u32::from(fast.is_some());
            assert_eq!(fast, slow::<$spec<'static>>(&text), "{text}");
        }
        n_parsed
    }};
}

fn all_kinds(seed: u64, wrong: u64) -> u32 {
    let writer = &mut Writer { state: seed, wrong };
    documents!(WorkloadEndpointSpec, writer)
        + documents!(HostEndpointSpec, writer)
        + documents!(NetworkSetSpec, writer)
        + documents!(TierSpec, writer)
        + documents!(ProfileSpec, writer)
        + documents!(PolicySpec, writer)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_document_reads_as_its_tree_does(seed in any::<u64>()) {
        // With every value of its right type, every document is read.
        prop_assert_eq!(all_kinds(seed, 0), 120);
        all_kinds(seed, 20);
    }
}

/// J-3: the one difference to a tree, in which the first value is not to be seen.
#[test]
fn a_value_of_a_wrong_type_counts_even_if_the_key_is_repeated() {
    for text in [r#"{"spec": {"tier": 1, "tier": "a"}}"#, r#"{"spec": [], "spec": {}}"#] {
        assert!(parse::<PolicySpec<'_>>(text).is_err(), "{text}");
        assert!(slow::<PolicySpec<'static>>(text).is_some(), "{text}");
    }
}
