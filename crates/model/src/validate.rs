//! Validation of names in internal records (datastore.md section 5).

use crate::v3::scalars::is_name;

/// Longest name of a port of an endpoint and of a profile, in bytes.
const MAX_NAME: usize = 128;

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
}
