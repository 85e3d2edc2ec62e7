//! Names that end up outside the process, and the hashes they are made of.
//!
//! Together with `compiler::names` the only place that builds strings that reach the kernel.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha224};

use crate::family::Family;

/// A cheap-to-clone, immutable string: names, label keys and values.
pub type Name = Arc<str>;

/// Longest name of a kernel IP set in bytes, without the final NUL.
pub const MAX_SET_NAME: usize = 31;

/// Identifier of an IP set, both families together (policy.md L-30, M-1): `s:…`, `n:…`, `svc:…`, `svcnoport:…`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetId(Name);

impl SetId {
    /// Returns the id of the set of addresses that match a selector, given its canonical text (L-31).
    pub fn for_selector(canonical: &str) -> Self {
        Self(unique_id("s", canonical).into())
    }

    /// Returns the id of a named-port set (M-4): `selector` is the id of the selector set,
    /// `protocol_key` one of `tcp`, `udp`, `sctp`, `any`.
    pub fn for_named_port(selector: &Self, protocol_key: &str, port_name: &str) -> Self {
        Self(unique_id("n", &format!("{},{protocol_key},{port_name}", selector.0)).into())
    }

    /// Returns the id of a service's (address, protocol, port) set.
    pub fn for_service(namespace: &str, name: &str) -> Self {
        Self(unique_id("svc", &format!("{namespace}/{name}")).into())
    }

    /// Returns the id of a service's address set.
    pub fn for_service_addresses(namespace: &str, name: &str) -> Self {
        Self(unique_id("svcnoport", &format!("{namespace}/{name}")).into())
    }

    /// Takes an identifier that is fixed (`this-host`) or was computed elsewhere.
    pub fn from_text(id: impl Into<Name>) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of the kernel set of one family: `cali40`/`cali60` and the id, cut to
    /// [`MAX_SET_NAME`] bytes (M-3). The `0` is a format version.
    pub fn kernel_name(&self, family: Family) -> String {
        let mut name = format!("cali{}0{}", family.digit(), self.0);
        let mut end = name.len().min(MAX_SET_NAME);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        name.truncate(end);
        name
    }
}

impl fmt::Debug for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns `prefix:` and the unpadded URL-safe base64 of SHA-224 over `prefix:content` (L-30).
pub fn unique_id(prefix: &str, content: &str) -> String {
    let mut hash = Sha224::new();
    hash.update(prefix.as_bytes());
    hash.update(b":");
    hash.update(content.as_bytes());
    format!("{prefix}:{}", URL_SAFE_NO_PAD.encode(hash.finalize()))
}
