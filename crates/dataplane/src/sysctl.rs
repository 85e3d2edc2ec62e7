//! Kernel settings: forwarding at start, and what each workload interface needs (host.md 3, 4).
//!
//! Fed by the apply loop with link states and wanted interfaces; writes below `/proc/sys`.
//!
//! Invariants: a value that is already there is not written; an interface is configured whenever it
//! comes up, even before a workload endpoint names it; one that could not be configured stays
//! [pending](Sysctls::pending) and is tried again. Settings are never taken back: they go with the interface.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use model::{LinkState, Name};
use program::InterfaceSpec;

use crate::error::DriverError;
use crate::options::Options;
use crate::report::DriverReport;
use crate::retry::Backoff;

/// Longest interface name in bytes (`IFNAMSIZ` without the final NUL).
const LONGEST_NAME: usize = 15;
/// What the reverse path filter is set to if the system's default cannot be read (host.md 3).
const STRICT: &str = "1";

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Sysctls {
    tree: Box<dyn Tree>,
    ipv6: bool,
    ip_forwarding: bool,
    prefixes: Vec<String>,
    /// Start-of-day value of `conf/default/rp_filter`.
    default_rp_filter: String,
    links: BTreeMap<Name, LinkState>,
    specs: BTreeMap<Name, InterfaceSpec>,
    pending: BTreeMap<Name, Backoff>,
    /// What is wrong with pending interfaces that exist.
    problems: BTreeMap<Name, String>,
    /// Settings whose failure does not keep an interface pending, and was said.
    tolerated: BTreeSet<String>,
    /// Settings of the host that could not be written, and the pause between attempts.
    host: Vec<&'static str>,
    host_backoff: Backoff,
    /// The time of the last call.
    last: Option<Instant>,
}

impl Sysctls {
    /// Allocates; touches nothing.
    pub fn new(options: &Options) -> Self {
        Self::with_tree(options, Box::new(Files::new(options.sysctl_root.clone())))
    }

    /// Uses another tree of settings than that of this host.
    pub fn with_tree(options: &Options, tree: Box<dyn Tree>) -> Self {
        Self {
            tree,
            ipv6: options.ipv6,
            ip_forwarding: options.ip_forwarding,
            prefixes: options.interface_prefixes.clone(),
            default_rp_filter: STRICT.to_owned(),
            links: BTreeMap::new(),
            specs: BTreeMap::new(),
            pending: BTreeMap::new(),
            problems: BTreeMap::new(),
            tolerated: BTreeSet::new(),
            host: Vec::new(),
            host_backoff: Backoff::default(),
            last: None,
        }
    }

    /// Switches forwarding on and learns the system's defaults; called once, before anything else (host.md 3).
    /// Forwarding that cannot be switched on is tried again by [`Self::sync`].
    pub fn start(&mut self, now: Instant) -> DriverReport {
        let mut report = DriverReport { driver: "sysctl".to_owned(), ..DriverReport::default() };
        if self.ip_forwarding {
            self.host.push("net/ipv4/ip_forward");
            if self.ipv6 {
                self.host.push("net/ipv6/conf/all/forwarding");
            }
        }
        self.configure_host(now, &mut report);
        // Absent until connection tracking is loaded; only counters depend on it.
        if let Err(error) = self.set("net/netfilter/nf_conntrack_acct", "1", &mut report) {
            tracing::warn!(error = error.full_text(), "no accounting of tracked connections");
        }
        report.reads += 1;
        match self.tree.read("net/ipv4/conf/default/rp_filter") {
            Ok(value) => self.default_rp_filter = value.trim().to_owned(),
            Err(error) => tracing::warn!(%error, "the default of rp_filter cannot be read; 1 is used"),
        }
        report
    }

    /// Takes the state of an interface; `None` if it is gone.
    pub fn want_link(&mut self, name: &Name, link: Option<LinkState>) {
        let Some(link) = link else {
            self.links.remove(name);
            self.settled(name);
            self.tolerated.retain(|setting| setting.split('/').nth(3) != Some(&**name));
            return;
        };
        let old = self.links.insert(Name::clone(name), link);
        if link.up && old != Some(link) && self.is_workload(name) {
            self.pending.insert(Name::clone(name), Backoff::default());
        }
    }

    /// Takes how a workload interface is to be set up; `None` if no endpoint uses it any more.
    pub fn want_interface(&mut self, name: &Name, spec: Option<InterfaceSpec>) {
        let old = match spec {
            Some(spec) => self.specs.insert(Name::clone(name), spec),
            None => self.specs.remove(name),
        };
        if old != spec {
            self.pending.insert(Name::clone(name), Backoff::default());
        }
    }

    /// Configures the host and the interfaces that are up, as far as that is not done yet.
    pub fn sync(&mut self, now: Instant) -> DriverReport {
        self.last = Some(now);
        let mut report = DriverReport { driver: "sysctl".to_owned(), ..DriverReport::default() };
        self.configure_host(now, &mut report);
        let due: Vec<Name> =
            self.pending.iter().filter(|(_, backoff)| backoff.ready(now)).map(|(name, _)| Name::clone(name)).collect();
        for name in due {
            // An interface that is down is configured when it comes up.
            let up = self.links.get(&name).is_some_and(|link| link.up);
            if !up || self.configure(&name, &mut report) {
                self.settled(&name);
            } else if let Some(backoff) = self.pending.get_mut(&name) {
                backoff.failed(now);
            }
        }
        if report.errors.is_empty() {
            let host = self.host.first().map(|setting| format!("/proc/sys/{setting} is not written yet"));
            report.waiting = host.or_else(|| self.problems.values().next().cloned());
        }
        report
    }

    fn configure_host(&mut self, now: Instant, report: &mut DriverReport) {
        if !self.host_backoff.ready(now) {
            return;
        }
        let mut failed = Vec::new();
        for setting in std::mem::take(&mut self.host) {
            if let Err(error) = self.set(setting, "1", report) {
                report.errors.push(error.full_text());
                failed.push(setting);
            }
        }
        self.host = failed;
        if self.host.is_empty() {
            self.host_backoff.succeeded();
        } else {
            self.host_backoff.failed(now);
        }
    }

    fn settled(&mut self, name: &Name) {
        self.pending.remove(name);
        self.problems.remove(name);
    }

    /// Interfaces that are not configured yet; their endpoints are reported down (host.md 8.6).
    pub fn pending(&self) -> impl Iterator<Item = &Name> {
        self.pending.keys()
    }

    /// When the driver wants to be called again, and why. A moment in the past means at once.
    pub fn next_due(&self) -> Option<(Instant, &'static str)> {
        let last = self.last?;
        let interfaces = self.pending.values().map(|backoff| backoff.due().unwrap_or(last)).min();
        let interfaces = interfaces.map(|due| (due, "interface settings"));
        let host = self.host_backoff.due().map(|due| (due, "host settings"));
        [interfaces, host].into_iter().flatten().min()
    }

    fn is_workload(&self, name: &str) -> bool {
        self.specs.contains_key(name) || self.prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
    }

    /// Writes the settings of one interface, both families' even if one fails. Returns true if all that
    /// matters is in force.
    fn configure(&mut self, name: &Name, report: &mut DriverReport) -> bool {
        if !is_plain(name) {
            // It cannot be an interface; and it must not lead out of the directory.
            report.errors.push(format!("`{name}` is no name of an interface"));
            return true;
        }
        let may_spoof = self.specs.get(name).is_some_and(|spec| spec.may_spoof);
        let rp_filter = if may_spoof { "0".to_owned() } else { self.default_rp_filter.clone() };
        let reported = report.errors.len();

        // A matter of security, so even with IPv6 support switched off (host.md 4, step 2).
        let accept_ra = format!("net/ipv6/conf/{name}/accept_ra");
        let outcome = self.set(&accept_ra, "0", report);
        if outcome.is_ok() || self.exists("ipv6", name) {
            self.tolerate(accept_ra, outcome, "the interface may take router advertisements");
        }

        let mut done = true;
        let conf = format!("net/ipv4/conf/{name}");
        let ipv4 = self.set(&format!("{conf}/route_localnet"), "1", report).and_then(|()| {
            let proxy_delay = format!("net/ipv4/neigh/{name}/proxy_delay");
            let outcome = self.set(&proxy_delay, "0", report);
            self.tolerate(proxy_delay, outcome, "proxied ARP answers may be slow");
            self.set(&format!("{conf}/proxy_arp"), "1", report)?;
            self.set(&format!("{conf}/forwarding"), "1", report)?;
            self.set(&format!("{conf}/rp_filter"), &rp_filter, report)
        });
        done &= self.judge("ipv4", name, ipv4, report);
        if self.ipv6 {
            let conf = format!("net/ipv6/conf/{name}");
            let ipv6 = self
                .set(&format!("{conf}/proxy_ndp"), "1", report)
                .and_then(|()| self.set(&format!("{conf}/forwarding"), "1", report));
            done &= self.judge("ipv6", name, ipv6, report);
        }
        match report.errors.get(reported) {
            Some(problem) => self.problems.insert(Name::clone(name), problem.clone()),
            None => self.problems.remove(name),
        };
        done
    }

    /// Says once that a setting could not be written with which the interface may be used all the same.
    fn tolerate(&mut self, setting: String, outcome: Result<(), DriverError>, consequence: &str) {
        match outcome {
            Ok(()) => {
                self.tolerated.remove(&setting);
            }
            Err(error) => {
                if self.tolerated.insert(setting) {
                    tracing::warn!(error = error.full_text(), "{consequence}");
                }
            }
        }
    }

    /// Returns true for success. A failure is only worth a report while the interface exists.
    fn judge(&self, family: &str, name: &str, result: Result<(), DriverError>, report: &mut DriverReport) -> bool {
        let Err(error) = result else {
            return true;
        };
        if self.exists(family, name) {
            report.errors.push(error.full_text());
        } else {
            tracing::debug!(interface = name, error = error.full_text(), "the interface is gone");
        }
        false
    }

    fn exists(&self, family: &str, name: &str) -> bool {
        self.tree.has(&format!("net/{family}/conf/{name}"))
    }

    /// Writes a value unless it is there already.
    fn set(&mut self, setting: &str, value: &str, report: &mut DriverReport) -> Result<(), DriverError> {
        report.reads += 1;
        // A value that cannot be read is written: some settings are write-only.
        if self.tree.read(setting).is_ok_and(|present| present.trim() == value) {
            return Ok(());
        }
        self.tree
            .write(setting, value)
            .map_err(|source| DriverError::Sysctl { path: self.tree.path(setting), source })?;
        report.writes += 1;
        Ok(())
    }
}

/// Where settings are read and written. A setting is a path below `/proc/sys`, like
/// `net/ipv4/conf/cali12345/proxy_arp`.
pub trait Tree: std::fmt::Debug + Send {
    /// Returns the value as the kernel shows it.
    ///
    /// # Errors
    ///
    /// If there is no such setting, or it cannot be read.
    fn read(&self, setting: &str) -> io::Result<String>;

    /// Sets a value.
    ///
    /// # Errors
    ///
    /// If there is no such setting, or the kernel refuses the value.
    fn write(&mut self, setting: &str, value: &str) -> io::Result<()>;

    /// Returns whether there is a directory of this name.
    fn has(&self, directory: &str) -> bool;

    /// Returns what a message is to call the setting.
    fn path(&self, setting: &str) -> String {
        format!("/proc/sys/{setting}")
    }
}

/// Settings as files.
#[derive(Debug)]
pub struct Files {
    root: PathBuf,
}

impl Files {
    /// `root` is `/proc/sys` outside of tests.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }
}

impl Tree for Files {
    fn read(&self, setting: &str) -> io::Result<String> {
        fs::read_to_string(self.root.join(setting))
    }

    fn write(&mut self, setting: &str, value: &str) -> io::Result<()> {
        write_once(&self.root.join(setting), value)
    }

    fn has(&self, directory: &str) -> bool {
        self.root.join(directory).is_dir()
    }

    fn path(&self, setting: &str) -> String {
        self.root.join(setting).display().to_string()
    }
}

/// One write to a file that is there; the kernel takes a setting only in one piece.
fn write_once(path: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    if file.write(value.as_bytes())? == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// True for what the kernel takes as a name of an interface; such a name is one component of a path.
fn is_plain(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && name != "." && name != ".." && !name.contains(['/', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Bed {
        directory: tempfile::TempDir,
        now: Instant,
    }

    impl Bed {
        fn new() -> Self {
            let bed = Self { directory: tempfile::tempdir().unwrap(), now: Instant::now() };
            bed.file("net/ipv4/ip_forward", "0\n");
            bed.file("net/ipv6/conf/all/forwarding", "0\n");
            bed.file("net/ipv4/conf/default/rp_filter", "2\n");
            bed.file("net/netfilter/nf_conntrack_acct", "0\n");
            bed
        }

        fn file(&self, path: &str, value: &str) {
            let path = self.directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }

        fn interface(&self, name: &str) {
            for setting in ["route_localnet", "proxy_arp", "forwarding", "rp_filter"] {
                self.file(&format!("net/ipv4/conf/{name}/{setting}"), "7\n");
            }
            self.file(&format!("net/ipv4/neigh/{name}/proxy_delay"), "8\n");
            for setting in ["accept_ra", "proxy_ndp", "forwarding"] {
                self.file(&format!("net/ipv6/conf/{name}/{setting}"), "7\n");
            }
        }

        fn remove(&self, path: &str) {
            fs::remove_file(self.directory.path().join(path)).unwrap();
        }

        fn value(&self, path: &str) -> String {
            fs::read_to_string(self.directory.path().join(path)).unwrap().trim().to_owned()
        }

        fn values(&self, name: &str) -> Vec<String> {
            let mut values: Vec<String> = ["route_localnet", "proxy_arp", "forwarding", "rp_filter"]
                .map(|setting| self.value(&format!("net/ipv4/conf/{name}/{setting}")))
                .to_vec();
            values.push(self.value(&format!("net/ipv4/neigh/{name}/proxy_delay")));
            values.extend(
                ["accept_ra", "proxy_ndp", "forwarding"].map(|s| self.value(&format!("net/ipv6/conf/{name}/{s}"))),
            );
            values
        }

        fn driver(&self, ipv6: bool) -> Sysctls {
            let root = self.directory.path().to_owned();
            let mut driver = Sysctls::new(&Options { ipv6, sysctl_root: root, ..Options::default() });
            assert_eq!(driver.start(self.now).errors, Vec::<String>::new());
            driver
        }
    }

    fn link(up: bool) -> Option<LinkState> {
        Some(LinkState { index: 7, up, generation: 0 })
    }

    #[test]
    fn forwarding_is_switched_on_at_start_and_not_written_twice() {
        let bed = Bed::new();
        bed.driver(true);
        assert_eq!(
            (bed.value("net/ipv4/ip_forward"), bed.value("net/ipv6/conf/all/forwarding")),
            ("1".into(), "1".into())
        );
        assert_eq!(bed.value("net/netfilter/nf_conntrack_acct"), "1");
        let root = bed.directory.path().to_owned();
        assert_eq!(Sysctls::new(&Options { sysctl_root: root, ..Options::default() }).start(bed.now).writes, 0);
    }

    #[test]
    fn what_is_switched_off_is_left_as_it_is() {
        let bed = Bed::new();
        let root = bed.directory.path().to_owned();
        Sysctls::new(&Options { ip_forwarding: false, sysctl_root: root, ..Options::default() }).start(bed.now);
        assert_eq!(
            (bed.value("net/ipv4/ip_forward"), bed.value("net/ipv6/conf/all/forwarding")),
            ("0".into(), "0".into())
        );
        bed.driver(false);
        assert_eq!(
            (bed.value("net/ipv4/ip_forward"), bed.value("net/ipv6/conf/all/forwarding")),
            ("1".into(), "0".into())
        );
    }

    #[test]
    fn an_interface_is_configured_when_it_comes_up_even_before_an_endpoint_names_it() {
        let bed = Bed::new();
        let mut driver = bed.driver(true);
        let (cali, eth): (Name, Name) = ("cali1".into(), "eth0".into());
        for name in [&cali, &eth] {
            bed.interface(name);
            driver.want_link(name, link(false));
        }
        assert_eq!(driver.sync(bed.now).reads, 0);
        for name in [&cali, &eth] {
            driver.want_link(name, link(true));
        }
        assert_eq!(driver.sync(bed.now).errors, Vec::<String>::new());
        // route_localnet, proxy_arp, forwarding, rp_filter, proxy_delay, accept_ra, proxy_ndp, forwarding
        assert_eq!(bed.values("cali1"), ["1", "1", "1", "2", "0", "0", "1", "1"]);
        assert_eq!(bed.values("eth0"), ["7", "7", "7", "7", "8", "7", "7", "7"]);
        assert_eq!((driver.pending().count(), driver.next_due()), (0, None));

        // The same again, by a successor: nothing to write.
        let mut driver = bed.driver(true);
        driver.want_link(&cali, link(true));
        driver.want_interface(&cali, Some(InterfaceSpec { may_spoof: false }));
        assert_eq!(driver.sync(bed.now).writes, 0);
    }

    #[test]
    fn a_workload_that_may_spoof_has_no_reverse_path_filter_and_gets_it_back() {
        let bed = Bed::new();
        bed.interface("tap1");
        let mut driver = bed.driver(true);
        let tap: Name = "tap1".into();
        driver.want_link(&tap, link(true));
        driver.want_interface(&tap, Some(InterfaceSpec { may_spoof: true }));
        driver.sync(bed.now);
        assert_eq!(bed.value("net/ipv4/conf/tap1/rp_filter"), "0");
        driver.want_interface(&tap, Some(InterfaceSpec { may_spoof: false }));
        driver.sync(bed.now);
        assert_eq!(bed.value("net/ipv4/conf/tap1/rp_filter"), "2");
    }

    #[test]
    fn router_advertisements_are_refused_even_without_ipv6_support() {
        let bed = Bed::new();
        bed.interface("cali1");
        let mut driver = bed.driver(false);
        driver.want_link(&"cali1".into(), link(true));
        driver.sync(bed.now);
        assert_eq!(bed.values("cali1")[5..], ["0", "7", "7"]);
    }

    #[test]
    fn a_failed_interface_is_tried_again_and_the_other_family_is_done_meanwhile() {
        let mut bed = Bed::new();
        bed.interface("cali1");
        bed.remove("net/ipv4/conf/cali1/proxy_arp");
        bed.remove("net/ipv4/neigh/cali1/proxy_delay");
        let mut driver = bed.driver(true);
        let name: Name = "cali1".into();
        driver.want_link(&name, link(true));
        let errors = driver.sync(bed.now).errors;
        assert!(errors.len() == 1 && errors[0].contains("cali1/proxy_arp"), "{errors:?}");
        assert_eq!(bed.value("net/ipv6/conf/cali1/proxy_ndp"), "1");
        assert_eq!(driver.pending().collect::<Vec<_>>(), [&name]);
        assert_eq!(driver.next_due(), Some((bed.now + Duration::from_millis(100), "interface settings")));
        bed.file("net/ipv4/conf/cali1/proxy_arp", "0\n");
        bed.now += Duration::from_millis(100);
        assert_eq!(driver.sync(bed.now).errors, Vec::<String>::new());
        assert_eq!((bed.value("net/ipv4/conf/cali1/rp_filter"), driver.pending().count()), ("2".into(), 0));
    }

    #[test]
    fn forwarding_that_cannot_be_switched_on_is_tried_again_and_no_success_is_claimed_meanwhile() {
        let mut bed = Bed::new();
        bed.remove("net/ipv4/ip_forward");
        let root = bed.directory.path().to_owned();
        let mut driver = Sysctls::new(&Options { sysctl_root: root, ..Options::default() });
        let report = driver.start(bed.now);
        assert!(report.errors.len() == 1 && report.errors[0].contains("ip_forward"), "{report:?}");
        bed.interface("cali1");
        driver.want_link(&"cali1".into(), link(true));
        let report = driver.sync(bed.now);
        assert!(report.errors.is_empty() && report.waiting.unwrap().contains("ip_forward"));
        assert_eq!(driver.next_due(), Some((bed.now + Duration::from_millis(100), "host settings")));
        bed.file("net/ipv4/ip_forward", "0\n");
        bed.now += Duration::from_millis(100);
        let report = driver.sync(bed.now);
        assert_eq!((report.errors.len(), report.waiting, report.writes), (0, None, 1));
        assert_eq!((bed.value("net/ipv4/ip_forward"), driver.next_due()), ("1".into(), None));
    }

    #[test]
    fn a_write_that_failed_is_not_counted_and_its_interface_keeps_the_driver_from_being_well() {
        let mut bed = Bed::new();
        bed.interface("cali1");
        bed.interface("cali2");
        bed.remove("net/ipv4/conf/cali1/route_localnet");
        let mut driver = bed.driver(true);
        driver.want_link(&"cali1".into(), link(true));
        let report = driver.sync(bed.now);
        // What succeeded: accept_ra, and the two of IPv6.
        assert_eq!((report.writes, report.errors.len()), (3, 1), "{report:?}");
        // Another interface meanwhile.
        driver.want_link(&"cali2".into(), link(true));
        let report = driver.sync(bed.now);
        assert!(report.errors.is_empty() && report.waiting.unwrap().contains("cali1/route_localnet"));
        bed.now += Duration::from_millis(100);
        let report = driver.sync(bed.now);
        assert_eq!((report.writes, report.errors.len(), report.waiting), (0, 1, None));
        driver.want_link(&"cali1".into(), None);
        assert_eq!(driver.sync(bed.now).waiting, None);
    }

    #[test]
    fn a_setting_that_is_done_without_is_complained_about_once_per_interface() {
        let mut bed = Bed::new();
        bed.interface("cali1");
        bed.remove("net/ipv6/conf/cali1/accept_ra");
        bed.remove("net/ipv4/conf/cali1/proxy_arp");
        let mut driver = bed.driver(true);
        let name: Name = "cali1".into();
        driver.want_link(&name, link(true));
        for _ in 0..3 {
            driver.sync(bed.now);
            assert_eq!(driver.tolerated.iter().collect::<Vec<_>>(), ["net/ipv6/conf/cali1/accept_ra"]);
            bed.now += Duration::from_secs(10);
        }
        driver.want_link(&name, None);
        assert!(driver.tolerated.is_empty(), "the next interface of this name is another");
    }

    #[test]
    fn an_interface_that_vanished_is_no_error_and_forgotten_with_its_link() {
        let bed = Bed::new();
        let mut driver = bed.driver(true);
        let name: Name = "cali1".into();
        driver.want_link(&name, link(true));
        assert_eq!(driver.sync(bed.now).errors, Vec::<String>::new());
        assert_eq!(driver.pending().count(), 1);
        driver.want_link(&name, None);
        assert_eq!(driver.pending().count(), 0);
    }

    #[test]
    fn a_name_cannot_lead_out_of_the_tree() {
        let bed = Bed::new();
        bed.file("net/ipv4/conf/x", "");
        let mut driver = bed.driver(true);
        for name in ["../../x", "..", ".", "", "a/b", "sixteen-letters-"] {
            let name: Name = name.into();
            driver.want_interface(&name, Some(InterfaceSpec { may_spoof: false }));
            driver.want_link(&name, link(true));
            let report = driver.sync(bed.now);
            assert_eq!((report.writes, report.errors.len()), (0, 1), "{name}");
        }
    }
}
