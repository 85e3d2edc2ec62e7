//! Validation of names in internal records and raw resources (datastore.md section 5).

use crate::v3::scalars::is_name;

/// Longest name of a port of an endpoint and of a profile, in bytes.
const MAX_NAME: usize = 128;

/// Longest name of a resource, in bytes.
const MAX_RESOURCE_NAME: usize = 253;

/// Longest name or value of a label of a resource, in bytes.
const MAX_LABEL: usize = 63;

/// Longest name of an interface, in bytes.
const MAX_INTERFACE: usize = 15;

/// Longest name of a port in a rule, in bytes.
const MAX_RULE_PORT_NAME: usize = 15;

/// Tells whether a text can name a port of an endpoint (V-4).
pub fn is_endpoint_port_name(name: &str) -> bool {
    is_name(name, MAX_NAME)
}

/// Tells whether a text can name a profile (V-5, V-6).
pub fn is_profile_name(name: &str) -> bool {
    is_name(name, MAX_NAME)
}

/// Tells whether a host endpoint may name its interface so (V-5).
pub fn is_host_interface(name: &str) -> bool {
    name.is_empty() || name == "*" || is_name(name, MAX_INTERFACE)
}

/// Tells whether a text can name a port in a rule (V-12): lower-case letters, digits and single inner
/// dashes, at least one letter.
pub fn is_rule_port_name(name: &str) -> bool {
    (1..=MAX_RULE_PORT_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--")
}

/// Tells whether a text can name a resource (V-20): labels of DNS in lower case, joined by dots.
pub fn is_resource_name(name: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.iter().all(|byte| is_inner(*byte) || *byte == b'-')
            && [bytes.first(), bytes.last()].iter().all(|end| end.is_some_and(|byte| is_inner(*byte)))
    };
    name.len() <= MAX_RESOURCE_NAME && name.split('.').all(is_label)
}

/// Tells whether a text can be the key of a label or annotation (V-20): a name, or a resource name, a
/// slash and a name.
pub fn is_qualified_name(text: &str) -> bool {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(is_resource_name) && !name.is_empty() && is_label_value(name)
}

/// Tells whether a text can be the value of a label (V-20). It may be empty.
pub fn is_label_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    text.is_empty() || (is_name(text, MAX_LABEL) && ends.iter().flatten().all(|byte| byte.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_rules_have_names_as_iana_gives_them() {
        for (name, wanted) in [
            ("http", true),
            ("a", true),
            ("1a", true),
            ("web-1", true),
            ("abcdefghijklmno", true),
            ("abcdefghijklmnop", false),
            ("", false),
            ("80", false),
            ("1-2", false),
            ("Http", false),
            ("-a", false),
            ("a-", false),
            ("a--b", false),
            ("a_b", false),
            ("a.b", false),
        ] {
            assert_eq!(is_rule_port_name(name), wanted, "{name}");
        }
    }

    #[test]
    fn other_names_have_up_to_128_bytes() {
        assert!(is_endpoint_port_name("Web_1.x-"));
        assert!(is_profile_name(&"x".repeat(128)));
        for name in ["", "a b", "a/b", "ö", &"x".repeat(129)] {
            assert!(!is_profile_name(name), "{name}");
        }
    }

    #[test]
    fn resources_are_named_like_hosts() {
        let long = format!("{0}.{0}.{0}.{0}", "a".repeat(63));
        for (name, wanted) in [
            ("a", true),
            ("kns.default", true),
            ("1-a.b--c", true),
            (&long[..253], true),
            (&long[..254], false),
            ("", false),
            ("A", false),
            (".a", false),
            ("a.", false),
            ("a..b", false),
            ("-a", false),
            ("a-", false),
            ("a.-b", false),
            ("a_b", false),
            ("ö", false),
        ] {
            assert_eq!(is_resource_name(name), wanted, "{name:?}");
        }
    }

    #[test]
    fn labels_have_keys_and_values_as_kubernetes_has_them() {
        let (longest, too_long) = ("x".repeat(63), "x".repeat(64));
        for (key, wanted) in [
            ("a", true),
            ("A_b.c-9", true),
            ("pcns.projectcalico.org/name", true),
            (longest.as_str(), true),
            (too_long.as_str(), false),
            ("", false),
            ("a/", false),
            ("/a", false),
            ("a/b/c", false),
            ("A/b", false),
            ("-a", false),
            ("a.", false),
            ("a b", false),
        ] {
            assert_eq!(is_qualified_name(key), wanted, "{key:?}");
        }
        for (value, wanted) in [
            ("", true),
            ("Prod", true),
            ("a_b", true),
            ("a/b", false),
            ("_a", false),
            ("a b", false),
            (&too_long, false),
        ] {
            assert_eq!(is_label_value(value), wanted, "{value:?}");
        }
    }
}
