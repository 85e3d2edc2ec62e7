//! Merges the sources into the effective configuration (operations.md 2.2).
//!
//! Fed by [`Raw`]; feeds the agent with [`Resolved`], or with every reason why it cannot start.
//!
//! Invariants: the result depends on the raw values only; a value of a local parameter is never
//! shown, nor is the value of a name that is not known (I12).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::params::{self, Param, Support};
use crate::raw::{Entry, Raw, Source};
use crate::settings::Settings;
use crate::value::Value;

/// The fewest mark bits that the rules need (netfilter.md 2.1 rule 2).
const FEWEST_MARK_BITS: u32 = 5;

/// The effective configuration with where it came from.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub settings: Settings,
    /// What the operator should know, in the order of the merge.
    pub notes: Vec<Note>,
    values: BTreeMap<&'static str, (Source, Value)>,
}

/// A value that stops the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub param: &'static str,
    pub source: Source,
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.param, self.source, self.reason)
    }
}

/// Why no configuration results; names every problem, so that one attempt is enough to mend them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid(pub Vec<Problem>);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

/// Something the operator should know about a value that does not stop the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// No parameter has this name.
    Unknown { name: String, source: Source },
    /// The value is the empty text and does not count.
    Empty { name: String, source: Source },
    /// Only the environment and the file may set it.
    NotLocal { param: &'static str, source: Source },
    /// The value is invalid; the built-in default counts, even if a weaker source has a valid one.
    UsesDefault { param: &'static str, source: Source, reason: String },
    /// It differs from its default but has no effect in this version.
    NotEffective { param: &'static str, source: Source },
    /// It differs from its default and asks for something that this agent does not do.
    NotSupported { param: &'static str, source: Source },
    /// It is deliberately without effect.
    NoEffect { param: &'static str, source: Source },
    /// Older releases had it.
    Retired { param: &'static str, source: Source, replacement: &'static str },
}

/// A parameter that two results differ in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub param: &'static str,
    /// Printed values; `(not shown)` for parameters that may hold credentials.
    pub old: String,
    pub new: String,
}

impl Raw {
    /// Merges all sources.
    ///
    /// # Errors
    ///
    /// All values that an operator must mend before the agent can start.
    pub fn resolve(&self) -> Result<Resolved, Invalid> {
        let mut merge = Merge::default();
        for (source, entry) in self.strongest_first() {
            if source == Source::Default {
                merge.computed.insert(&entry.spelling, &entry.value);
            }
        }
        for (source, entry) in self.strongest_first().filter(|(source, _)| *source != Source::Default) {
            merge.take(source, entry);
        }
        merge.finish()
    }
}

#[derive(Default)]
struct Merge<'a> {
    /// Defaults that depend on the host, by canonical name.
    computed: BTreeMap<&'a str, &'a str>,
    values: BTreeMap<&'static str, (Source, Value)>,
    notes: Vec<Note>,
    problems: Vec<Problem>,
    reported: BTreeSet<&'static str>,
}

impl Merge<'_> {
    fn take(&mut self, source: Source, entry: &Entry) {
        if entry.value.is_empty() {
            self.notes.push(Note::Empty { name: entry.spelling.clone(), source });
            return;
        }
        let Some(param) = params::find(&entry.spelling) else {
            self.unknown(source, entry);
            return;
        };
        if param.local && !source.is_local() {
            self.notes.push(Note::NotLocal { param: param.name, source });
            return;
        }
        let value = match parse(param, &entry.value) {
            Ok(value) => value,
            Err(reason) if param.strict || reason.fatal => {
                self.problems.push(Problem { param: param.name, source, reason: reason.text });
                return;
            }
            Err(reason) => {
                self.notes.push(Note::UsesDefault { param: param.name, source, reason: reason.text });
                self.built_in(param)
            }
        };
        // A stronger source may have set it; this value was only parsed to be checked.
        self.values.entry(param.name).or_insert((source, value));
    }

    fn unknown(&mut self, source: Source, entry: &Entry) {
        let retired = params::RETIRED.iter().find(|retired| retired.name.eq_ignore_ascii_case(&entry.spelling));
        match retired {
            Some(retired) if self.reported.insert(retired.name) => {
                self.notes.push(Note::Retired { param: retired.name, source, replacement: retired.replacement });
            }
            Some(_) => (),
            None => self.notes.push(Note::Unknown { name: entry.spelling.clone(), source }),
        }
    }

    fn finish(mut self) -> Result<Resolved, Invalid> {
        let mut settings = Settings::default();
        for param in params::all() {
            let default = self.built_in(param);
            let (source, value) = self.values.entry(param.name).or_insert_with(|| (Source::Default, default.clone()));
            let differs = *value != default;
            match param.support {
                Support::Effective(set) => set(&mut settings, value),
                Support::Connection => (),
                Support::Later if differs => self.notes.push(Note::NotEffective { param: param.name, source: *source }),
                Support::NoEffect if differs => self.notes.push(Note::NoEffect { param: param.name, source: *source }),
                Support::Unsupported if differs => {
                    self.notes.push(Note::NotSupported { param: param.name, source: *source });
                }
                Support::Later | Support::NoEffect | Support::Unsupported => (),
            }
        }
        self.check(&settings);
        if self.problems.is_empty() {
            Ok(Resolved { settings, notes: self.notes, values: self.values })
        } else {
            Err(Invalid(self.problems))
        }
    }

    /// The computed or built-in value; that all built-in ones parse is tested.
    fn built_in(&self, param: &Param) -> Value {
        let raw = self.computed.get(param.name).copied().unwrap_or(param.default);
        if raw.is_empty() {
            return Value::Unset;
        }
        param.kind.parse(raw).unwrap_or(Value::Unset)
    }

    /// Checks that concern more than the text of one value.
    fn check(&mut self, settings: &Settings) {
        if settings.hostname.is_empty() {
            self.problem("FelixHostname", "the name of this host is not known; set it");
        }
        if settings.mark_mask.count_ones() < FEWEST_MARK_BITS
            && !self.problems.iter().any(|p| p.param == "IptablesMarkMask")
        {
            self.problem("IptablesMarkMask", "fewer than five bits are set, which the rules need");
        }
        // The wrong kind of dataplane, silently, would leave the host unprotected (operations.md 3.15).
        for param in ["BPFEnabled", "WireguardEnabled", "WireguardEnabledV6"] {
            if self.values.get(param).is_some_and(|(_, value)| *value == Value::Flag(true)) {
                self.problem(param, "this agent does not have that dataplane; set it to false");
            }
        }
    }

    fn problem(&mut self, param: &'static str, reason: &str) {
        let source = self.values.get(param).map_or(Source::Default, |(source, _)| *source);
        self.problems.push(Problem { param, source, reason: reason.to_owned() });
    }
}

/// Why a value does not count.
struct Refused {
    text: String,
    /// Not to be replaced by the default, whatever the parameter.
    fatal: bool,
}

fn parse(param: &Param, raw: &str) -> Result<Value, Refused> {
    if raw.eq_ignore_ascii_case("none") {
        return if param.required {
            Err(Refused { text: "`none` is not allowed".to_owned(), fatal: true })
        } else {
            Ok(Value::Unset)
        };
    }
    param.kind.parse(raw).map_err(|reason| {
        let text = if param.local { reason } else { format!("{raw:?} is {}", reason.trim_start()) };
        // A mistyped endpoint must not become a try at this host.
        Refused { text, fatal: matches!(param.support, Support::Connection) }
    })
}

impl Resolved {
    /// Returns the value of a parameter, by its canonical name, and where it came from.
    pub fn get(&self, name: &str) -> Option<(Source, &Value)> {
        self.values.get(name).map(|(source, value)| (*source, value))
    }

    /// Returns a parameter's text if a source set it, even to `none`.
    pub(crate) fn explicit(&self, name: &str) -> Option<&Value> {
        self.get(name).filter(|(source, _)| *source != Source::Default).map(|(_, value)| value)
    }

    /// Lists the parameters that have an effect only at the next start and that differ in another
    /// result: those that are effective and not live (operations.md 2.8), and whether this is an
    /// OpenStack cluster.
    pub fn restart_differences(&self, new: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        for param in params::all().filter(|param| param.is_effective() && !param.live) {
            if let (Some((_, old)), Some((_, new))) = (self.get(param.name), new.get(param.name))
                && old != new
            {
                let show = |value: &Value| if param.local { "(not shown)".to_owned() } else { value.to_string() };
                differences.push(Difference { param: param.name, old: show(old), new: show(new) });
            }
        }
        if differences.is_empty() && self.settings.is_openstack() != new.settings.is_openstack() {
            let (old, new) = (&self.settings.cluster_type, &new.settings.cluster_type);
            differences.push(Difference { param: "ClusterType", old: old.clone(), new: new.clone() });
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_set_gives_the_defaults_without_a_note() {
        let resolved = raw(&[]).resolve().unwrap();
        assert!(resolved.notes.is_empty(), "{:?}", resolved.notes);
        assert_eq!(resolved.settings.interface_prefixes, ["cali"]);
        assert_eq!(resolved.settings.mark_mask, 0xffff_0000);
        assert_eq!(resolved.settings.table_refresh, Some(std::time::Duration::from_secs(180)));
        assert!(resolved.settings.check_invalid);
    }

    use Source::{DatastoreGlobal, DatastoreHost, Environment, File};

    /// The table of operations.md 2.2: number, input, parameter, its value as it prints or what the
    /// refusal says. Case 12 is in the tests of `file`, case 13's spelling in those of `environment`.
    #[allow(clippy::type_complexity, reason = "rows of a table")]
    const MERGES: &[(&str, &[(Source, &str, &str)], &str, Result<&str, &str>)] = &[
        (
            "1",
            &[(Environment, "logseverityscreen", "debug"), (File, "LogSeverityScreen", "ERROR")],
            "LogSeverityScreen",
            Ok("DEBUG"),
        ),
        (
            "2",
            &[(Environment, "iptablesrefreshinterval", "abc"), (DatastoreGlobal, "IptablesRefreshInterval", "60")],
            "IptablesRefreshInterval",
            Ok("180"),
        ),
        (
            "3",
            &[(File, "ChainInsertMode", "prepend"), (Environment, "chaininsertmode", "append")],
            "ChainInsertMode",
            Err("ChainInsertMode (config file): \"prepend\" is not one of"),
        ),
        (
            "4",
            &[(File, "InterfacePrefix", "none")],
            "InterfacePrefix",
            Err("InterfacePrefix (config file): `none` is not allowed"),
        ),
        ("5", &[(File, "FailsafeInboundHostPorts", "none")], "FailsafeInboundHostPorts", Ok("none")),
        ("6", &[(Environment, "logfilepath", "")], "LogFilePath", Ok("/var/log/calico/felix.log")),
        ("7", &[(Environment, "logfilepath", "None")], "LogFilePath", Ok("none")),
        ("8", &[(DatastoreGlobal, "EtcdAddr", "h:1")], "EtcdAddr", Ok("127.0.0.1:2379")),
        ("9", &[(File, "IptablesMarkMask", "0x1")], "IptablesMarkMask", Err("fewer than two bits")),
        ("9a", &[(File, "IptablesMarkMask", "0xf")], "IptablesMarkMask", Err("fewer than five bits")),
        ("10", &[(File, "HealthPort", "0x2383")], "HealthPort", Ok("9091")),
        ("10a", &[(File, "HealthPort", "08")], "HealthPort", Ok("9099")),
        ("10b", &[(File, "HealthPort", "010")], "HealthPort", Ok("8")),
        ("13", &[(Environment, "ipv6support", "False")], "Ipv6Support", Ok("false")),
        (
            "host beats global",
            &[(DatastoreGlobal, "MaxIpsetSize", "1"), (DatastoreHost, "maxipsetsize", "2")],
            "MaxIpsetSize",
            Ok("2"),
        ),
        (
            "required though weak",
            &[(Environment, "maxipsetsize", "9"), (DatastoreHost, "MaxIpsetSize", "none")],
            "MaxIpsetSize",
            Err("`none` is not allowed"),
        ),
        (
            "bpf is refused",
            &[(DatastoreGlobal, "BPFEnabled", "true")],
            "BPFEnabled",
            Err("does not have that dataplane"),
        ),
        (
            "wireguard is refused",
            &[(DatastoreGlobal, "WireguardEnabled", "true")],
            "WireguardEnabled",
            Err("does not have that dataplane"),
        ),
        ("wrong host name", &[(File, "FelixHostname", "a b")], "FelixHostname", Ok("h1")),
    ];

    #[test]
    fn sources_merge_as_the_specification_says() {
        for (case, entries, name, expected) in MERGES {
            match (raw(entries).resolve(), expected) {
                (Ok(resolved), Ok(expected)) => {
                    assert_eq!(resolved.get(name).unwrap().1.to_string(), *expected, "case {case}");
                }
                (Err(invalid), Err(part)) => assert!(invalid.to_string().contains(part), "case {case}: {invalid}"),
                (got, expected) => panic!("case {case}: got {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn without_a_name_for_the_host_there_is_no_start() {
        let text = Raw::default().resolve().unwrap_err().to_string();
        assert_eq!(text, "FelixHostname (default): the name of this host is not known; set it");
    }

    #[test]
    fn what_does_not_count_or_has_no_effect_is_noted_with_its_source() {
        let unsupported = "NFTablesFlowTableOffload";
        let cases: &[((Source, &str, &str), Note)] = &[
            ((File, "nosuchparam", "1"), Note::Unknown { name: "nosuchparam".into(), source: File }),
            ((Environment, "logfilepath", ""), Note::Empty { name: "logfilepath".into(), source: Environment }),
            ((DatastoreGlobal, "etcdaddr", "h:1"), Note::NotLocal { param: "EtcdAddr", source: DatastoreGlobal }),
            (
                (File, "vxlanport", "x"),
                Note::UsesDefault { param: "VXLANPort", source: File, reason: "\"x\" is not a whole number".into() },
            ),
            ((File, "HealthEnabled", "true"), Note::NotEffective { param: "HealthEnabled", source: File }),
            ((File, unsupported, "All"), Note::NotSupported { param: unsupported, source: File }),
            ((File, "GoMaxProcs", "4"), Note::NoEffect { param: "GoMaxProcs", source: File }),
            (
                (File, "dropactionoverride", "ACCEPT"),
                Note::Retired { param: "DropActionOverride", source: File, replacement: "IptablesFilterDenyAction" },
            ),
        ];
        for (entry, note) in cases {
            assert_eq!(raw(&[*entry]).resolve().unwrap().notes, std::slice::from_ref(note), "{entry:?}");
        }
        // A value equal to the default is worth no line.
        assert!(raw(&[(File, "HealthEnabled", "false")]).resolve().unwrap().notes.is_empty());
    }

    #[test]
    fn no_message_shows_what_may_be_a_credential() {
        let entries = [
            (File, "EtcdEndpoints", "https://root:hunter2@a:1"),
            (File, "EtcdAddr", "root:hunter2@a:1"),
            (File, "EtcdPassword", "hunter2"),
            (File, "ChainInsertMode", "prepend"),
        ];
        let text = format!("{:?} {:?}", raw(&entries[2..3]).resolve().unwrap(), raw(&entries));
        assert!(!text.contains("hunter2"), "{text}");
        let invalid = raw(&entries).resolve().unwrap_err();
        let text = format!("{invalid} {invalid:?}");
        assert!(text.contains("EtcdEndpoints") && text.contains("EtcdAddr") && text.contains("prepend"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[test]
    fn only_what_takes_effect_at_a_start_asks_for_a_restart() {
        #[allow(clippy::type_complexity, reason = "rows of a table")]
        let cases: &[(&[(Source, &str, &str)], &[&str])] = &[
            (&[], &[]),
            (&[(DatastoreGlobal, "calicoversion", "v3.33"), (DatastoreGlobal, "clusterguid", "x")], &[]),
            (&[(DatastoreGlobal, "clustertype", "k8s,bgp")], &[]),
            (&[(DatastoreGlobal, "clustertype", "openstack")], &["ClusterType"]),
            (&[(DatastoreGlobal, "healthtimeoutoverrides", "a=1s")], &[]),
            (&[(DatastoreGlobal, "healthport", "1")], &[]),
            (&[(DatastoreGlobal, "interfaceprefix", "cali")], &[]),
            (
                &[(DatastoreGlobal, "interfaceprefix", "tap"), (DatastoreHost, "maxipsetsize", "7")],
                &["InterfacePrefix", "MaxIpsetSize"],
            ),
            (&[(DatastoreGlobal, "variant", "Other")], &["Variant"]),
        ];
        let old = raw(&[]).resolve().unwrap();
        for (entries, expected) in cases {
            let names: Vec<_> =
                old.restart_differences(&raw(entries).resolve().unwrap()).into_iter().map(|d| d.param).collect();
            assert_eq!(&names, expected, "{entries:?}");
        }
    }

    fn raw(entries: &[(Source, &str, &str)]) -> Raw {
        let mut raw = Raw::default();
        raw.set(Source::Default, "FelixHostname", "h1");
        for (source, name, value) in entries {
            raw.set(*source, name, value);
        }
        raw
    }
}
