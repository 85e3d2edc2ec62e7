//! FelixConfiguration (datastore.md 3.14): fields by a table, values turned to parameter text.
//!
//! The fields are not a struct because nobody reads them one by one: all that is wanted of a field is the
//! text that the same parameter would have in a configuration file (C-44, C-45).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::object::objects;
use super::scalars::{NumberOrText, Port, Protocol};
use super::text::{Text, TextMap};

mod duration;
mod fields;

/// The one field that is not a parameter (C-43).
const NODE_SELECTOR: &str = "nodeSelector";

/// `spec` of a Felix configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FelixConfigurationSpec {
    /// Which nodes a configuration with a name of its own is for (C-47).
    pub node_selector: String,
    /// Text by parameter name, in the spelling of the parameter table; unset fields are not in it.
    pub parameters: BTreeMap<&'static str, String>,
}

/// How the value of a field becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Text,
    Int,
    Seconds,
    Millis,
    Port,
    Ports,
    Texts,
    TextMap,
    Dscp,
    Failsafe,
    Range,
    Ranges,
    HealthTimeouts,
    ConntrackTimeouts,
}

impl<'de> Deserialize<'de> for FelixConfigurationSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SpecVisitor;

        impl<'de> Visitor<'de> for SpecVisitor {
            type Value = FelixConfigurationSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the fields of a FelixConfiguration")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FelixConfigurationSpec, A::Error> {
                let mut spec = FelixConfigurationSpec::default();
                while let Some(field) = map.next_key::<String>()? {
                    if field == NODE_SELECTOR {
                        spec.node_selector = map.next_value::<Option<String>>()?.unwrap_or_default();
                        continue;
                    }
                    let Some((parameter, kind)) = fields::find(&field) else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    let value: Value = map.next_value()?;
                    match kind.text(&value).map_err(|reason| A::Error::custom(format_args!("{field}: {reason}")))? {
                        Some(text) => spec.parameters.insert(parameter, text),
                        None => spec.parameters.remove(parameter),
                    };
                }
                Ok(spec)
            }
        }

        deserializer.deserialize_map(SpecVisitor)
    }
}

/// Why a value does not fit its field.
type Mismatch = serde_json::Error;

objects! {
    /// One of the failsafe ports.
    pub struct FailsafePort<'a> {
        "protocol" protocol: Protocol<'a>,
        "port" port: u16,
        "net" net: Text<'a>,
    }

    /// A range of numbers, both ends included.
    pub struct Range {
        "min" min: i64,
        "max" max: i64,
    }

    /// How long a part of the agent may be silent.
    pub struct HealthTimeout<'a> {
        "name" name: Text<'a>,
        "timeout" timeout: Text<'a>,
    }
}

impl Kind {
    /// Returns the text of a value, `None` if the field counts as unset.
    fn text(self, value: &Value) -> Result<Option<String>, Mismatch> {
        if value.is_null() {
            return Ok(None);
        }
        Ok(match self {
            Self::Bool => Some(read::<bool>(value)?.to_string()),
            Self::Text => Some(read::<String>(value)?).filter(|text| !text.is_empty()),
            Self::Int => Some(read::<i64>(value)?.to_string()),
            Self::Seconds => Some(duration::in_units(&read::<String>(value)?, duration::SECOND)?),
            Self::Millis => Some(duration::in_units(&read::<String>(value)?, duration::MILLISECOND)?),
            Self::Port => Some(read::<Port<'_>>(value)?.to_string()),
            Self::Ports => Some(joined(read::<Vec<Port<'_>>>(value)?)),
            Self::Texts => Some(read::<Vec<String>>(value)?.join(",")),
            Self::TextMap => Some(
                read::<TextMap<'_>>(value)?
                    .sorted()
                    .into_iter()
                    .map(|(key, value)| format!("{key}={value},"))
                    .collect(),
            ),
            Self::Dscp => Some(read::<NumberOrText>(value)?.to_string()),
            Self::Failsafe => Some(failsafe_text(&read::<Vec<FailsafePort<'_>>>(value)?)),
            Self::Range => Some(range_text(&read::<Range>(value)?)),
            Self::Ranges => Some(joined(read::<Vec<Range>>(value)?.iter().map(range_text))),
            Self::HealthTimeouts => {
                let timeouts: Vec<HealthTimeout<'_>> = read(value)?;
                for HealthTimeout { timeout, .. } in &timeouts {
                    duration::parse(timeout)?;
                }
                let text = joined(timeouts.iter().map(|HealthTimeout { name, timeout }| format!("{name}={timeout}")));
                Some(text).filter(|text| !text.is_empty())
            }
            Self::ConntrackTimeouts => Some(conntrack_timeouts_text(&read(value)?)),
        })
    }
}

fn read<'v, T: Deserialize<'v>>(value: &'v Value) -> Result<T, Mismatch> {
    T::deserialize(value)
}

fn joined(parts: impl IntoIterator<Item = impl ToString>) -> String {
    parts.into_iter().map(|part| part.to_string()).collect::<Vec<_>>().join(",")
}

fn range_text(Range { min, max }: &Range) -> String {
    format!("{min}-{max}")
}

/// C-45.
fn failsafe_text(ports: &[FailsafePort<'_>]) -> String {
    if ports.is_empty() {
        return "none".to_owned();
    }
    joined(ports.iter().map(|FailsafePort { protocol, port, net }| {
        let protocol = protocol.to_string().to_lowercase();
        match &**net {
            "" => format!("{protocol}:{port}"),
            v6 if v6.contains(':') => format!("{protocol}:[{v6}]:{port}"),
            v4 => format!("{protocol}:{v4}:{port}"),
        }
    }))
}

/// `FieldName=value` in the order of the fields; those that are unset are left out.
fn conntrack_timeouts_text(timeouts: &TextMap<'_>) -> String {
    const FIELDS: [(&str, &str); 8] = [
        ("creationGracePeriod", "CreationGracePeriod"),
        ("tcpSynSent", "TCPSynSent"),
        ("tcpEstablished", "TCPEstablished"),
        ("tcpFinsSeen", "TCPFinsSeen"),
        ("tcpResetSeen", "TCPResetSeen"),
        ("udpTimeout", "UDPTimeout"),
        ("genericTimeout", "GenericTimeout"),
        ("icmpTimeout", "ICMPTimeout"),
    ];
    joined(FIELDS.iter().filter_map(|(field, name)| {
        timeouts.get(field).filter(|value| !value.is_empty()).map(|value| format!("{name}={value}"))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_the_text_of_a_configuration_file() {
        for (field, value, wanted) in [
            ("bpfEnabled", "true", Some(("BPFEnabled", "true"))),
            ("ipipEnabled", "false", Some(("IpInIpEnabled", "false"))),
            ("bpfEnabled", "null", None),
            ("interfacePrefix", "\"cali,tap\"", Some(("InterfacePrefix", "cali,tap"))),
            ("interfacePrefix", "\"\"", None),
            ("maxIpsetSize", "1048576", Some(("MaxIpsetSize", "1048576"))),
            ("reportingInterval", "\"90s\"", Some(("ReportingIntervalSecs", "90"))),
            ("reportingInterval", "\"1500ms\"", Some(("ReportingIntervalSecs", "1.5"))),
            ("reportingTTL", "\"1h1m1.25s\"", Some(("ReportingTTLSecs", "3661.25"))),
            ("iptablesRefreshInterval", "\"0\"", Some(("IptablesRefreshInterval", "0"))),
            ("iptablesLockProbeInterval", "\"50ms\"", Some(("IptablesLockProbeIntervalMillis", "50"))),
            ("natPortRange", "\"1000:2000\"", Some(("NATPortRange", "1000:2000"))),
            ("kubeNodePortRanges", "[\"30000:32767\", 80]", Some(("KubeNodePortRanges", "30000:32767,80"))),
            ("externalNodesList", "[]", Some(("ExternalNodesCIDRList", ""))),
            ("externalNodesList", "[\"a\", \"b\"]", Some(("ExternalNodesCIDRList", "a,b"))),
            ("bpfLogFilters", "{\"b\": \"y\", \"a\": \"x\"}", Some(("BPFLogFilters", "a=x,b=y,"))),
            ("istioDSCPMark", "23", Some(("IstioDSCPMark", "23"))),
            ("istioDSCPMark", "\"EF\"", Some(("IstioDSCPMark", "EF"))),
            ("failsafeInboundHostPorts", "[]", Some(("FailsafeInboundHostPorts", "none"))),
            (
                "failsafeOutboundHostPorts",
                r#"[{"protocol":"TCP","port":22},{"protocol":"udp","port":68,"net":"0.0.0.0/0"},{"protocol":6,"port":22,"net":"fd00::/8"}]"#,
                Some(("FailsafeOutboundHostPorts", "tcp:22,udp:0.0.0.0/0:68,6:[fd00::/8]:22")),
            ),
            ("routeTableRange", r#"{"min":1,"max":250}"#, Some(("RouteTableRange", "1-250"))),
            ("routeTableRanges", r#"[{"min":1,"max":2},{"min":5,"max":6}]"#, Some(("RouteTableRanges", "1-2,5-6"))),
            ("healthTimeoutOverrides", "[]", None),
            (
                "healthTimeoutOverrides",
                r#"[{"name":"A","timeout":"1m"},{"name":"B","timeout":"5s"}]"#,
                Some(("HealthTimeoutOverrides", "A=1m,B=5s")),
            ),
            (
                "bpfConntrackTimeouts",
                r#"{"tcpSynSent":"20s","udpTimeout":"Auto","icmpTimeout":null}"#,
                Some(("BPFConntrackTimeouts", "TCPSynSent=20s,UDPTimeout=Auto")),
            ),
            ("notAField", "{\"any\": [1]}", None),
        ] {
            let text = format!("{{{field:?}: {value}}}");
            let spec: FelixConfigurationSpec =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
            let found: Vec<_> = spec.parameters.iter().map(|(name, text)| (*name, text.as_str())).collect();
            assert_eq!(found, Vec::from_iter(wanted), "{text}");
        }
    }

    #[test]
    fn a_wrong_type_makes_the_whole_document_unparsable() {
        for text in [
            r#"{"bpfEnabled": "true"}"#,
            r#"{"maxIpsetSize": "1"}"#,
            r#"{"maxIpsetSize": 1.5}"#,
            r#"{"reportingInterval": 30}"#,
            r#"{"reportingInterval": "30"}"#,
            r#"{"failsafeInboundHostPorts": [{"protocol": "tcp", "port": 70000}]}"#,
            r#"{"healthTimeoutOverrides": [{"name": "A", "timeout": "soon"}]}"#,
            r#"{"nodeSelector": 1}"#,
            "[]",
        ] {
            assert!(serde_json::from_str::<FelixConfigurationSpec>(text).is_err(), "{text}");
        }
    }
}
