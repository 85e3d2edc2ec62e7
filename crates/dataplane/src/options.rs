//! What the operator chose, as far as drivers depend on it.

use std::path::PathBuf;
use std::time::Duration;

use crate::iptables::features::Overrides;
use crate::progress::Progress;

/// How far sets grow beyond `MaxIpsetSize` (users.md U3.b).
pub const LARGEST_SET_FACTOR: u32 = 4;

/// Options of the dataplane; plain data, built by the agent from the settings.
#[derive(Clone, Debug)]
pub struct Options {
    pub ipv6: bool,
    /// `IPForwarding`: switch the host's forwarding on at start; otherwise it is left as it is.
    pub ip_forwarding: bool,
    /// `IptablesBackend`; `None` is `auto`: decided by evidence (netfilter.md 18.1).
    pub variant: Option<Variant>,
    /// `StateDirectory`: where the variant in use is remembered; `None` remembers nothing.
    pub state_directory: Option<PathBuf>,
    /// `FeatureDetectOverride`.
    pub features: Overrides,
    /// Prove at the start that packets see our rules (U6.c).
    pub canary: bool,
    pub insert_mode: ChainInsertMode,
    /// `InterfacePrefix`.
    pub interface_prefixes: Vec<String>,
    /// `DeviceRouteProtocol`.
    pub route_protocol: u8,
    /// `RemoveExternalRoutes`.
    pub remove_external_routes: bool,
    /// `IptablesRefreshInterval`; `None` turns the check off.
    pub table_refresh: Option<Duration>,
    /// `IptablesPostWriteCheckIntervalSecs`: the first look at a table after a write; each further one waits
    /// twice as long.
    pub post_write_check: Duration,
    /// `IpsetsRefreshInterval`.
    pub set_refresh: Option<Duration>,
    /// A set of which more members are wanted than `MaxIpsetSize` is made larger, up to this many.
    pub largest_set: u32,
    /// `RouteRefreshInterval`.
    pub route_refresh: Option<Duration>,
    /// `InterfaceRefreshInterval`: how often all interfaces are listed.
    pub link_refresh: Option<Duration>,
    /// `IptablesLockProbeIntervalMillis`.
    pub lock_probe: Duration,
    /// The file that iptables' programs lock; [`USUAL_PATH`](crate::iptables::lock::USUAL_PATH) unless it is
    /// mounted elsewhere.
    pub lock_file: PathBuf,
    /// Time limit of one child process. Long: one that is slow is worth a warning, not an end.
    pub program_timeout: Duration,
    /// Counts what moves.
    pub progress: Progress,
    /// Keep restore programs running between transactions, if their self-test allows it (performance.md 4.4).
    pub hold_restore_open: bool,
    /// `NetlinkTimeoutSecs`.
    pub netlink_timeout: Duration,
    /// Root of the sysctl tree, `/proc/sys` outside tests.
    pub sysctl_root: PathBuf,
}

/// Which of the two iptables variants is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    Legacy,
    Nft,
}

impl Variant {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }

    /// Returns the one that is not in use if this one is.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Legacy => Self::Nft,
            Self::Nft => Self::Legacy,
        }
    }
}

/// `ChainInsertMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainInsertMode {
    Insert,
    Append,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ipv6: true,
            ip_forwarding: true,
            variant: None,
            state_directory: None,
            features: Overrides::default(),
            canary: true,
            insert_mode: ChainInsertMode::Insert,
            interface_prefixes: vec!["cali".to_owned()],
            route_protocol: 3,
            remove_external_routes: true,
            table_refresh: Some(Duration::from_secs(180)),
            post_write_check: Duration::from_secs(5),
            set_refresh: Some(Duration::from_secs(90)),
            largest_set: LARGEST_SET_FACTOR * 1_048_576,
            route_refresh: Some(Duration::from_secs(90)),
            link_refresh: Some(Duration::from_secs(90)),
            lock_probe: Duration::from_millis(50),
            lock_file: PathBuf::from(crate::iptables::lock::USUAL_PATH),
            program_timeout: Duration::from_secs(600),
            progress: Progress::default(),
            hold_restore_open: true,
            netlink_timeout: Duration::from_secs(10),
            sysctl_root: PathBuf::from("/proc/sys"),
        }
    }
}
