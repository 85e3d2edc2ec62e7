//! What the kernel and the tools can do (netfilter.md 18.2).

/// Features that change the text of rules or the way programs are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// `SNAT --random-fully`.
    pub snat_random_fully: bool,
    /// `MASQUERADE --random-fully`.
    pub masquerade_random_fully: bool,
    /// `NFLOG --nflog-size`; without it the older `--nflog-range`.
    pub nflog_size: bool,
    /// The restore program takes the xtables lock itself (`--wait`).
    pub restore_supports_lock: bool,
}

impl Default for Features {
    /// What every current system has.
    fn default() -> Self {
        Self { snat_random_fully: true, masquerade_random_fully: true, nflog_size: true, restore_supports_lock: true }
    }
}
