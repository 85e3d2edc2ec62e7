//! Counts what an agent writes to the kernel.
//!
//! Three witnesses, none of them the agent: wrappers around the tools that it starts, which log the arguments and copy
//! what goes into a restore; the kernel's notifications of route and neighbour changes; and those of nf_tables changes,
//! which show a write by whatever means. What leaves no such trace (sets over netlink) is witnessed by the sets' random
//! seeds in [`Kernel::seeds`](crate::kernel::Kernel::seeds).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use testkit::netns::{Netns, Process};

/// The programs that can write what the agent owns.
const TOOLS: &[&str] = &[
    "iptables",
    "iptables-legacy",
    "iptables-nft",
    "iptables-restore",
    "iptables-legacy-restore",
    "iptables-nft-restore",
    "ip6tables",
    "ip6tables-legacy",
    "ip6tables-nft",
    "ip6tables-restore",
    "ip6tables-legacy-restore",
    "ip6tables-nft-restore",
    "ipset",
    "ip",
    "nft",
    "sysctl",
];

/// Wrappers around the tools; put the directory in front of an agent's search path.
#[derive(Debug)]
pub struct Wrappers {
    directory: TempDir,
}

impl Wrappers {
    /// Makes a wrapper for every tool that is installed.
    ///
    /// # Errors
    ///
    /// If they cannot be written.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let bin = directory.path().join("bin");
        std::fs::create_dir(&bin)?;
        for tool in TOOLS {
            let Some(real) = which(tool) else { continue };
            let path = bin.join(tool);
            std::fs::write(&path, wrapper(tool, &real, directory.path()))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { directory })
    }

    /// Returns the directory with the wrappers.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("bin")
    }

    /// Returns every call of a tool in `netns`, with its arguments.
    ///
    /// # Errors
    ///
    /// If the log cannot be read.
    pub fn calls(&self, netns: &Netns) -> Result<Vec<String>> {
        let inode = format!("{} ", inode(netns)?);
        let calls = lines(&self.directory.path().join("calls"))?;
        Ok(calls.iter().filter_map(|call| call.strip_prefix(&inode)).map(str::to_owned).collect())
    }

    /// Returns how many transactions that change something each restore program was given in `netns`, by program and
    /// table, for example `ip6tables-nft-restore filter`.
    ///
    /// # Errors
    ///
    /// If a log cannot be read.
    pub fn transactions(&self, netns: &Netns) -> Result<BTreeMap<String, usize>> {
        let mut transactions = BTreeMap::new();
        for (tool, input) in self.inputs(netns)? {
            let (mut table, mut changes) = ("", 0);
            for line in input.iter().map(|line| line.trim()) {
                if let Some(name) = line.strip_prefix('*') {
                    (table, changes) = (name, 0);
                } else if line == "COMMIT" {
                    if changes > 0 {
                        *transactions.entry(format!("{tool} {table}")).or_default() += 1;
                    }
                } else if !line.is_empty() && !line.starts_with('#') {
                    changes += 1;
                }
            }
        }
        Ok(transactions)
    }

    /// Returns what would change the kernel of `netns`: calls that do not only read, and committed lines of restores.
    ///
    /// An agent that tries its tools in a namespace of its own making changes nothing here.
    ///
    /// # Errors
    ///
    /// If a log cannot be read.
    pub fn writes(&self, netns: &Netns) -> Result<Vec<String>> {
        let mut writes: Vec<String> = self.calls(netns)?.into_iter().filter(|call| !only_reads(call)).collect();
        for (tool, input) in self.inputs(netns)? {
            writes.extend(written(&tool, &input).into_iter().map(|line| format!("{tool}: {line}")));
        }
        Ok(writes)
    }

    /// Returns what the tools were given on their standard input in `netns`, in order of the tools' names.
    fn inputs(&self, netns: &Netns) -> Result<Vec<(String, Vec<String>)>> {
        let prefix = format!("input.{}.", inode(netns)?);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.directory.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let mut inputs = Vec::new();
        for name in names {
            let Some(tool) = name.strip_prefix(&prefix).and_then(|rest| rest.split('.').next()) else { continue };
            inputs.push((tool.to_owned(), lines(&self.directory.path().join(&name))?));
        }
        Ok(inputs)
    }
}

/// Returns the wrapper of a tool: it logs the namespace and the call, copies its input, and becomes the tool.
///
/// The copying is beside and not in front of the tool, so that the tool's end is the wrapper's.
fn wrapper(tool: &str, real: &Path, log: &Path) -> String {
    let (real, log) = (real.display(), log.display());
    let copy = if tool.ends_with("restore") || tool == "ipset" {
        format!("< <(exec tee {log}/input.$inode.{tool}.$$ 2>/dev/null)")
    } else {
        String::new()
    };
    format!(
        "#!/bin/bash\n\
         inode=$(stat -L -c %i /proc/self/ns/net)\n\
         echo \"$inode {tool} $*\" >> {log}/calls\n\
         exec {real} \"$@\" {copy}\n"
    )
}

/// Returns what distinguishes the namespace from all others.
fn inode(netns: &Netns) -> Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(netns.path())?))
}

/// Returns the lines of an input that ask for a change and have been committed.
fn written(tool: &str, input: &[String]) -> Vec<String> {
    let mut writes = Vec::new();
    let mut transaction = Vec::new();
    for line in input.iter().map(|line| line.trim()) {
        if line == "COMMIT" {
            writes.append(&mut transaction);
        } else if line.starts_with('*') {
            transaction.clear();
        } else if !(line.is_empty() || line.starts_with('#') || line == "quit") {
            transaction.push(line.to_owned());
        }
    }
    if tool == "ipset" {
        writes.append(&mut transaction);
    }
    writes
}

/// Returns whether a call leaves the kernel as it is; a restore is judged by its input.
fn only_reads(call: &str) -> bool {
    let (tool, arguments) = call.split_once(' ').unwrap_or((call, ""));
    let reading =
        ["-V", "--version", "version", "-S", "-L", "-n", "--list", "-C", "--check", "save", "list", "show", "-h"];
    tool.ends_with("-restore")
        || (tool == "ip" && arguments.starts_with("netns exec"))
        || (tool == "ipset" && arguments.contains("restore"))
        || arguments.split(' ').any(|word| reading.contains(&word))
}

fn which(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(tool)).find(|path| path.is_file())
}

/// Returns the lines of a file, none if there is no file.
fn lines(path: &Path) -> Result<Vec<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// The kernel's own notifications of changes in a namespace.
#[derive(Debug)]
pub struct Notifications {
    directory: TempDir,
    monitors: Vec<Process>,
}

impl Notifications {
    /// Starts to listen; returns when a change is known to be heard.
    ///
    /// # Errors
    ///
    /// If a monitor cannot be started.
    pub fn start(netns: &Netns) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut monitors = Vec::new();
        for (name, words) in [
            ("routes", &["ip", "monitor", "route", "neigh"][..]), // Line by line, not by blocks of 4096 bytes.
            ("tables", &["stdbuf", "-oL", "xtables-monitor", "--event"][..]),
        ] {
            let output = File::create(directory.path().join(name))?;
            let (program, arguments) = words.split_first().context("a program")?;
            let mut command = netns.command(program);
            command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
            monitors.push(Process::start(&mut command)?);
        }
        let notifications = Self { directory, monitors };
        notifications.prove(netns)?;
        Ok(notifications)
    }

    /// Makes changes of its own until each monitor has reported one, and takes them back.
    fn prove(&self, netns: &Netns) -> Result<()> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            netns.sh("ip route add blackhole 192.0.2.255; ip route del blackhole 192.0.2.255
                 iptables-nft -N proof; iptables-nft -X proof")?;
            let heard = |name, text| Ok::<_, anyhow::Error>(self.read(name)?.iter().any(|line| line.contains(text)));
            if heard("routes", PROOF_ROUTE)? && heard("tables", PROOF_CHAIN)? {
                return Ok(());
            }
            anyhow::ensure!(std::time::Instant::now() < deadline, "no notification of a change in {}", netns.name());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    fn read(&self, name: &str) -> Result<Vec<String>> {
        lines(&self.directory.path().join(name))
    }

    /// Stops listening and returns the changes to routes and permanent neighbours, and every transaction of nf_tables.
    ///
    /// # Errors
    ///
    /// If a log cannot be read.
    pub fn finish(mut self) -> Result<Vec<String>> {
        self.monitors.clear();
        let routes = self.read("routes")?.into_iter().filter(|line| {
            // Without a state in capitals it is a route; neighbours that the kernel resolved itself are its own affair.
            let of_kernel = ["REACHABLE", "STALE", "DELAY", "PROBE", "FAILED", "INCOMPLETE", "NOARP", "proto kernel"];
            // So are its routes and its neighbours without ARP, which come and go with interfaces.
            !line.contains(PROOF_ROUTE) && !of_kernel.iter().any(|state| line.contains(state))
        });
        // A transaction is its changes and then the new generation (xtables-monitor(8)).
        let mut tables = Vec::new();
        let mut proof = false;
        for line in self.read("tables")? {
            proof |= line.contains(PROOF_CHAIN);
            if line.starts_with("NEWGEN") {
                if !std::mem::take(&mut proof) {
                    tables.push(line);
                }
            } else if !proof && line.contains("-t ") {
                tables.push(line);
            }
        }
        Ok(routes.chain(tables).collect())
    }
}

const PROOF_ROUTE: &str = "192.0.2.255";
const PROOF_CHAIN: &str = "proof";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_is_told_from_writing() {
        let calls = [
            ("iptables-legacy-save -t filter", true),
            ("iptables-nft --version", true),
            ("iptables-legacy -w -S", true),
            ("iptables-legacy -w -A INPUT -j ACCEPT", false),
            ("iptables-nft-restore --noflush --wait 10", true),
            ("ipset list -n", true),
            ("ipset version", true),
            ("ipset restore", true),
            ("ipset destroy cali40x", false),
            ("sysctl -w net.ipv4.ip_forward=1", false),
        ];
        for (call, reads) in calls {
            // The save programs are not wrapped; what they are called with only reads.
            assert_eq!(only_reads(call) || call.contains("-save"), reads, "{call}");
        }
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let nothing = "*filter\nCOMMIT\n# comment\n\n*filter\n:never-committed - -\n";
        assert_eq!(written("iptables-nft-restore", &lines(nothing)), [""; 0]);
        let something = "*filter\n:cali-x - [0:0]\n-A cali-x -j DROP\nCOMMIT";
        assert_eq!(written("iptables-nft-restore", &lines(something)), [":cali-x - [0:0]", "-A cali-x -j DROP"]);
        assert_eq!(written("ipset", &lines("add cali40s:x 10.0.0.1\nquit")), ["add cali40s:x 10.0.0.1"]);
    }

    #[test]
    fn wrappers_run_the_real_tool_and_remember_what_it_was_told() {
        testkit::kernel_test!("iptables-legacy-restore", "xtables-monitor");
        let netns = Netns::new("wrapped").unwrap();
        let wrappers = Wrappers::new().unwrap();
        let notifications = Notifications::start(&netns).unwrap();
        let bin = wrappers.path();
        let path = format!("PATH={}:$PATH", bin.display());
        netns
            .sh(&format!("{path}; printf '*filter\\nCOMMIT\\n' | iptables-legacy-restore --noflush; ipset list -n"))
            .unwrap();
        assert_eq!(wrappers.writes(&netns).unwrap(), [""; 0]);
        assert_eq!(wrappers.calls(&netns).unwrap(), ["iptables-legacy-restore --noflush", "ipset list -n"]);
        netns
            .sh(&format!(
                "{path}; printf '*filter\\n:cali-x - [0:0]\\nCOMMIT\\n' | iptables-nft-restore --noflush
                 iptables-nft -A cali-x -j DROP
                 ip route add blackhole 198.51.100.7"
            ))
            .unwrap();
        assert_eq!(
            wrappers.writes(&netns).unwrap(),
            [
                "iptables-nft -A cali-x -j DROP",
                "ip route add blackhole 198.51.100.7",
                "iptables-nft-restore: :cali-x - [0:0]"
            ]
        );
        let transactions = wrappers.transactions(&netns).unwrap();
        assert_eq!(transactions.into_iter().collect::<Vec<_>>(), [("iptables-nft-restore filter".to_owned(), 1)]);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        for (monitor, text) in [("tables", "-j DROP"), ("routes", "198.51.100.7")] {
            while !notifications.read(monitor).unwrap().iter().any(|line| line.contains(text)) {
                assert!(std::time::Instant::now() < deadline, "{monitor}: {:?}", notifications.read(monitor));
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let heard = notifications.finish().unwrap();
        for text in ["198.51.100.7", "cali-x -j DROP"] {
            assert!(heard.iter().any(|line| line.contains(text)), "{text}: {heard:?}");
        }
    }
}
