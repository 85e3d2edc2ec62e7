//! Rule hashes: how a rule of ours is recognised in what the kernel shows (netfilter.md 15).
//!
//! A hash depends on the chain's name, on the rule's text and on all rules before it, so that equal
//! lists of hashes mean equal chains. The algorithm is the reference's: a host that changes agents
//! keeps its rules.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use program::Rule;
use sha2::{Digest as _, Sha224};

use super::features::Features;
use super::render::write_tail;

/// Length of a hash in characters.
const LEN: usize = 16;

/// Bytes of the digest that make the characters of the hash: three bytes are four characters.
const DIGEST_BYTES: usize = LEN / 4 * 3;

/// Added to the name of a base chain for the hashes of its appended rules (15.1, item 4).
pub const APPENDS_SUFFIX: &str = "*appends*";

/// The 16 characters that identify a rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleHash([u8; LEN]);

impl RuleHash {
    /// Takes a hash as it was read back; `None` unless it is 16 characters of the alphabet.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !plain {
            return None;
        }
        text.as_bytes().try_into().ok().map(Self)
    }

    pub fn as_str(&self) -> &str {
        // Only the URL-safe base64 alphabet gets in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for RuleHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for RuleHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Returns the hashes of a chain's rules in order. The name is the chain's own; for the appended
/// rules of a base chain it ends in [`APPENDS_SUFFIX`].
pub fn rule_hashes(chain_name_for_hash: &str, rules: &[Rule], features: &Features) -> Vec<RuleHash> {
    let mut hashes = Vec::with_capacity(rules.len());
    let mut text = String::with_capacity(256);
    text.push_str("-A ");
    text.push_str(chain_name_for_hash);
    text.push_str(" HASH");
    let head = text.len();
    let mut state = Sha224::digest(chain_name_for_hash.as_bytes());
    for rule in rules {
        text.truncate(head);
        write_tail(&mut text, rule, features);
        state = Sha224::new().chain_update(state).chain_update(text.as_bytes()).finalize();
        hashes.push(shorten(&state));
    }
    hashes
}

fn shorten(digest: &[u8]) -> RuleHash {
    let mut hash = [b'_'; LEN];
    let input = digest.get(..DIGEST_BYTES).unwrap_or_default();
    // 12 bytes are exactly 16 characters, and SHA-224 has 28 bytes: neither step can fall short.
    let written = URL_SAFE_NO_PAD.encode_slice(input, &mut hash);
    debug_assert_eq!(written.ok(), Some(LEN));
    RuleHash(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::{Action, ChainName};

    #[test]
    fn hashes_chain_and_depend_on_the_chain_name() {
        let jump = |chain: &str| Rule::new(Vec::new(), Action::Jump(ChainName::new(chain).unwrap()));
        let drop = Rule::new(Vec::new(), Action::Drop);
        let accept = Rule::new(Vec::new(), Action::Accept);
        let hashes = |name: &str, rules: &[Rule]| {
            rule_hashes(name, rules, &Features::default()).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            hashes("FORWARD", &[drop.clone(), accept.clone(), drop, accept]),
            ["hecdSCslEjdBPBPo", "plvr29-ZiKUwbzDV", "BMJ7gfua-eMLZ8Gu", "rmnR1gc8haxMy_0W"]
        );
        assert_eq!(hashes("POSTROUTING", &[jump("cali-POSTROUTING")]), ["O3lYWMrLQYEMJtB5"]);
        assert_eq!(hashes("POSTROUTING*appends*", &[jump("cali-POSTROUTING")]), ["0i8pjzKKPyA34aQD"]);
    }

    #[test]
    fn only_sixteen_characters_of_the_alphabet_are_a_hash() {
        let good = "hecdSCslEjdBPBPo";
        assert_eq!(RuleHash::parse(good).map(|hash| hash.to_string()).as_deref(), Some(good));
        for bad in ["", "hecdSCslEjdBPBP", "hecdSCslEjdBPBPoo", "hecdSCslEjdBPBP!", "hecdSCslEjdBPBé"] {
            assert_eq!(RuleHash::parse(bad), None, "{bad}");
        }
    }
}
