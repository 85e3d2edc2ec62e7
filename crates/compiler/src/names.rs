//! Names of chains and prefixes of log records (netfilter.md 3, 12.1).
//!
//! Together with `model::names` the only place that builds strings that end in the kernel. Fed with
//! names from the datastore, feeds every other module here.
//!
//! Invariants: every function is total, whatever bytes a stored name holds; two different objects never
//! get one chain name (short of a collision of a cut SHA-256).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use model::{Family, PolicyKey, SetId};
use program::{ChainName, Direction, SetName};
use sha2::{Digest as _, Sha256};
use sha3::Sha3_224;

/// Kernel's limit for interface names, without the final NUL.
const MAX_INTERFACE: usize = 15;

/// Longest NFLOG prefix that stays as it is; one byte less than the kernel takes, so that nobody can
/// give an object the shortened form of another one's prefix.
const MAX_LOG_PREFIX: usize = 62;

pub const INPUT: &str = "cali-INPUT";
pub const FORWARD: &str = "cali-FORWARD";
pub const OUTPUT: &str = "cali-OUTPUT";
pub const PREROUTING: &str = "cali-PREROUTING";
pub const POSTROUTING: &str = "cali-POSTROUTING";
pub const WORKLOAD_TO_HOST: &str = "cali-wl-to-host";
pub const FROM_WORKLOAD_DISPATCH: &str = "cali-from-wl-dispatch";
pub const TO_WORKLOAD_DISPATCH: &str = "cali-to-wl-dispatch";
pub const FROM_HOST_ENDPOINT: &str = "cali-from-host-endpoint";
pub const TO_HOST_ENDPOINT: &str = "cali-to-host-endpoint";
pub const FROM_HOST_FORWARD: &str = "cali-from-hep-forward";
pub const TO_HOST_FORWARD: &str = "cali-to-hep-forward";
pub const FAILSAFE_IN: &str = "cali-failsafe-in";
pub const FAILSAFE_OUT: &str = "cali-failsafe-out";
pub const CIDR_BLOCK: &str = "cali-cidr-block";
pub const RPF_SKIP: &str = "cali-rpf-skip";
pub const WIREGUARD_MARK: &str = "cali-wireguard-incoming-mark";
pub const FORWARD_CHECK: &str = "cali-forward-check";
pub const FORWARD_ENDPOINT_MARK: &str = "cali-forward-endpoint-mark";
pub const SET_ENDPOINT_MARK: &str = "cali-set-endpoint-mark";
pub const FROM_ENDPOINT_MARK: &str = "cali-from-endpoint-mark";
pub const FLOATING_DNAT: &str = "cali-fip-dnat";
pub const FLOATING_SNAT: &str = "cali-fip-snat";
pub const NAT_OUTGOING: &str = "cali-nat-outgoing";
pub const EGRESS_DSCP: &str = "cali-egress-dscp";

pub const TO_WORKLOAD: &str = "cali-tw-";
pub const FROM_WORKLOAD: &str = "cali-fw-";
pub const TO_HOST: &str = "cali-th-";
pub const FROM_HOST: &str = "cali-fh-";
pub const TO_HOST_FW: &str = "cali-thfw-";
pub const FROM_HOST_FW: &str = "cali-fhfw-";
pub const SET_MARK: &str = "cali-sm-";

/// Stands for the interface of a wildcard host endpoint in chain names (3.2).
pub const ANY_INTERFACE: &str = "any-interface-at-all";

/// Returns `prefix` and `suffix`, or a hash of the suffix where the whole would be longer than `max`
/// bytes (3.2).
pub fn limited_id(prefix: &str, suffix: &str, max: usize) -> String {
    let suffix = if suffix.is_empty() { "_" } else { suffix };
    let total = prefix.len() + suffix.len();
    if total > max || (total == max && suffix.starts_with('_')) {
        hashed_id(prefix, suffix, max)
    } else {
        format!("{prefix}{suffix}")
    }
}

fn hashed_id(prefix: &str, content: &str, max: usize) -> String {
    let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(content.as_bytes()));
    let room = max.saturating_sub(prefix.len() + 1).min(hash.len());
    // The alphabet is ASCII, so every index is a boundary.
    format!("{prefix}_{}", hash.get(..room).unwrap_or_default())
}

/// Returns the chain of a prefix and a variable part. A variable part that the kernel would not take is
/// hashed as if it were too long.
pub fn chain(prefix: &str, suffix: &str) -> ChainName {
    ChainName::new(&limited_id(prefix, suffix, ChainName::MAX))
        .unwrap_or_else(|| ChainName::fixed(&hashed_id(prefix, suffix, ChainName::MAX)))
}

/// Returns the chain of one direction of a policy.
pub fn policy_chain(key: &PolicyKey, direction: Direction) -> ChainName {
    let prefix = match direction {
        Direction::Ingress => "cali-pi-",
        Direction::Egress => "cali-po-",
    };
    if key.name.contains('/') || key.namespace.contains('/') {
        // Such names are not valid, and `a/b` must not be taken for name `b` in namespace `a`.
        let PolicyKey { kind, namespace, name } = key;
        let content = format!("{}\n{}\n{namespace}\n{name}", kind.as_str(), namespace.len());
        return ChainName::fixed(&hashed_id(prefix, &content, ChainName::MAX));
    }
    chain(prefix, &key.to_string())
}

/// Returns the chain of one direction of a profile.
pub fn profile_chain(name: &str, direction: Direction) -> ChainName {
    match direction {
        Direction::Ingress => chain("cali-pri-", name),
        Direction::Egress => chain("cali-pro-", name),
    }
}

/// Returns the chain of a group of neighbouring policies (3.4). Staged policies count.
pub fn group_chain<'a>(
    selector: &str,
    direction: Direction,
    policies: impl ExactSizeIterator<Item = &'a PolicyKey>,
) -> ChainName {
    let (prefix, word) = match direction {
        Direction::Ingress => ("cali-gi-", "inbound"),
        Direction::Egress => ("cali-go-", "outbound"),
    };
    let mut text = format!("{selector}\n{word}\n{}\n", policies.len());
    for PolicyKey { kind, namespace, name } in policies {
        text.push_str("{Name: ");
        text.push_str(name);
        text.push_str(", Namespace: ");
        text.push_str(namespace);
        text.push_str(", Kind: ");
        text.push_str(kind.as_str());
        text.push_str("}\n");
    }
    let hash = URL_SAFE_NO_PAD.encode(Sha3_224::digest(text.as_bytes()));
    let room = ChainName::MAX - prefix.len();
    ChainName::fixed(&format!("{prefix}{}", hash.get(..room).unwrap_or_default()))
}

/// Returns the kernel name of a set whose id is a word of the program, such as `this-host`.
pub fn fixed_set(id: &str, family: Family) -> SetName {
    SetName::fixed(&SetId::from_text(id).kernel_name(family))
}

/// Returns the prefix of flow log records for a text, shortened where the kernel would cut it (12.1).
/// Bytes that would not be one word in a rule become `_`.
pub fn flow_log_prefix(text: &str) -> String {
    let plain = |b: u8| if b.is_ascii_graphic() && b != b'"' && b != b'\'' && b != b'\\' { char::from(b) } else { '_' };
    if text.len() <= MAX_LOG_PREFIX {
        return text.bytes().map(plain).collect();
    }
    let head = text.bytes().take(10).map(plain);
    let tail = text.bytes().skip(text.len() - 10).map(plain);
    let middle = limited_id("", text, 42);
    head.chain(middle.chars()).chain(['_']).chain(tail).collect()
}

/// Says why a name cannot be that of an interface we program, if it cannot. Workload endpoints come from
/// the datastore with any text as interface name, and the name ends in rules, routes and paths.
pub fn interface_defect(name: &str) -> Option<&'static str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > MAX_INTERFACE {
        Some("is longer than 15 bytes")
    } else if !name.bytes().all(plain) {
        Some("has characters other than letters, digits, `_`, `.` and `-`")
    } else if matches!(name, "." | ".." | "all" | "default" | "lo") {
        Some("is not that of a workload interface")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::PolicyKind;

    fn key(namespace: &str, name: &str) -> PolicyKey {
        PolicyKey { kind: PolicyKind::NetworkPolicy, namespace: namespace.into(), name: name.into() }
    }

    #[test]
    fn names_the_kernel_would_refuse_are_hashed() {
        for name in ["a b", "a\nCOMMIT", "ä", "a\"b", "a'b"] {
            let chain = profile_chain(name, Direction::Ingress);
            assert!(chain.as_str().starts_with("cali-pri-_"), "{chain}");
            assert_eq!(chain.as_str().len(), ChainName::MAX);
        }
        assert_ne!(profile_chain("a b", Direction::Ingress), profile_chain("a  b", Direction::Ingress));
    }

    #[test]
    fn slashes_in_names_do_not_make_two_policies_share_a_chain() {
        let chains = [key("a", "b/c"), key("a/b", "c"), key("", "a/b/c"), key("a", "b")];
        let chains: std::collections::BTreeSet<_> =
            chains.iter().map(|key| policy_chain(key, Direction::Egress)).collect();
        assert_eq!(chains.len(), 4);
        assert!(chains.contains(&ChainName::fixed("cali-po-np/a/b")));
    }

    #[test]
    fn flow_log_prefixes_are_one_word_of_at_most_63_bytes() {
        assert_eq!(flow_log_prefix("DPI|a b\n\"é"), "DPI|a_b____");
        let long = flow_log_prefix(&format!("API0|{}", "é".repeat(60)));
        assert_eq!(long.len(), 63);
        assert!(long.starts_with("API0|______") && long.is_ascii(), "{long}");
    }

    #[test]
    fn only_plain_interface_names_are_taken() {
        for good in ["cali1234abcd567", "tap12345678-90", "cali_1.2", "cali"] {
            assert_eq!(interface_defect(good), None, "{good}");
        }
        for bad in ["", "cali123456789012", "cali 1", "cali+", "cali/1", "cali\n", "cali\"", "caliä", "..", "lo", "all"]
        {
            assert!(interface_defect(bad).is_some(), "{bad}");
        }
    }
}
