//! The table of parameters against the reference's, and the example file against the table.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test reads vectors and may fail")]

use std::fs;

use serde_json::Value as Json;
use settings::{Kind, Param, Raw, Source, Support, file, params};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/config_params.json");
const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../config/felix.cfg.example");

#[test]
fn names_defaults_kinds_and_flags_are_those_of_the_reference() {
    let vectors = vectors();
    let mut rows = 0;
    for row in vectors["params"].as_array().unwrap() {
        let name = text(&row["name"]);
        let param = params::find(name).unwrap_or_else(|| panic!("{name} is not known"));
        assert_eq!(param.name, name);
        // The default that is computed from the host comes from the agent.
        let default = text(&row["default"]).replace("(computed)", "");
        assert_eq!(param.default, default, "default of {name}");
        assert!(fits(&param.kind, text(&row["type"])), "{name}: {:?} for {}", param.kind, row["type"]);
        if let (Kind::OneOf(words), Some(allowed)) = (param.kind, row["allowed"].as_array()) {
            assert_eq!(words, allowed.iter().map(text).collect::<Vec<_>>(), "words of {name}");
        }
        let flags = [param.required, param.strict, param.local, param.live];
        let expected =
            ["non_zero", "die_on_parse_failure", "local_only", "live"].map(|flag| row[flag].as_bool().unwrap());
        assert_eq!(flags, expected, "flags of {name}");
        assert_eq!(text(&row["support"]) == "unsupported", matches!(param.support, Support::Unsupported), "{name}");
        rows += 1;
    }
    assert_eq!(rows, 218);
    // Our own additions (operations.md 3.19) and nothing else.
    let own: Vec<&str> =
        params::all().map(|param| param.name).filter(|name| !names(&vectors["params"]).contains(name)).collect();
    assert_eq!(own, ["LogFormatScreen", "StateDirectory", "LogFormatFile", "ConntrackCleanup", "ControlSocketPath"]);
    let retired: Vec<&str> = params::RETIRED.iter().map(|retired| retired.name).collect();
    assert_eq!(retired, names(&vectors["retired"]));
}

#[test]
fn every_default_parses_and_reads_back_as_itself() {
    for param in params::all().filter(|param| !param.default.is_empty()) {
        let value = param.kind.parse(param.default).unwrap_or_else(|reason| panic!("{}: {reason}", param.name));
        let again = param.kind.parse(&value.to_string());
        // Milliseconds are kept as seconds.
        if param.kind != Kind::Millis {
            assert_eq!(again.as_ref(), Ok(&value), "{}", param.name);
        }
    }
}

#[test]
fn the_example_file_is_what_the_table_says() {
    let expected = settings::example::text();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(EXAMPLE, &expected).unwrap();
    }
    let found = fs::read_to_string(EXAMPLE).unwrap_or_default();
    assert!(
        found == expected,
        "config/felix.cfg.example is stale; write it again with UPDATE_EXPECT=1 cargo test -p settings"
    );
}

#[test]
fn the_example_file_with_every_parameter_switched_on_gives_the_defaults() {
    let text: String = settings::example::text()
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') && rest.contains(" =") => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let contents = file::parse(&text).unwrap();
    let effective: Vec<&Param> = params::all().filter(|param| param.is_effective()).collect();
    assert_eq!(contents.pairs.len(), effective.len());
    let (mut raw, mut none) = (Raw::default(), Raw::default());
    for raw in [&mut raw, &mut none] {
        raw.set(Source::Default, "FelixHostname", "h1");
    }
    for (name, value) in &contents.pairs {
        raw.set(Source::File, name, value);
    }
    assert_eq!(raw.resolve().unwrap().settings, none.resolve().unwrap().settings);
}

fn fits(kind: &Kind, word: &str) -> bool {
    let words: &[&str] = match kind {
        Kind::Flag => &["bool"],
        Kind::OptionalFlag => &["*bool"],
        Kind::Int { .. } => &["int"],
        Kind::Seconds => &["seconds"],
        Kind::Millis => &["millis"],
        Kind::OneOf(_) => &["oneof"],
        Kind::Text | Kind::PlainText => &["string"],
        Kind::Path | Kind::ExistingFile | Kind::Executable => &["file"],
        Kind::Hostname => &["hostname"],
        Kind::HostAddress => &["host-address"],
        Kind::Authority => &["authority"],
        Kind::Interfaces => &["iface-list"],
        Kind::InterfacePatterns => &["iface-list-regexp"],
        Kind::InterfaceMatch => &["iface-param"],
        Kind::InterfaceMatches => &["iface-filter-slice"],
        Kind::Regexp => &["regexp"],
        Kind::Ipv4 => &["ipv4"],
        Kind::Ipv6 => &["ipv6"],
        Kind::Nets => &["cidr-list"],
        Kind::Ports => &["port-list"],
        Kind::PortRange => &["portrange"],
        Kind::PortRanges => &["portrange-list"],
        Kind::MarkMask => &["mark-bitmask"],
        Kind::Pairs => &["keyvaluelist"],
        Kind::Durations => &["keydurationlist"],
        Kind::Region => &["region"],
        Kind::TableRange => &["route-table-range"],
        Kind::TableRanges => &["route-table-ranges"],
        Kind::LogRate => &["log-rate"],
        Kind::Dscp => &["dscp"],
        Kind::Endpoints => &["endpoint-list"],
    };
    words.contains(&word)
}

fn vectors() -> Json {
    serde_json::from_str(&fs::read_to_string(VECTORS).unwrap()).unwrap()
}

fn names(rows: &Json) -> Vec<&str> {
    rows.as_array().unwrap().iter().map(|row| text(&row["name"])).collect()
}

fn text(value: &Json) -> &str {
    value.as_str().unwrap_or_default()
}
