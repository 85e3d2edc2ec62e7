//! The agent as a process: the real binary, started the way a service manager starts it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use testkit::netns::{Netns, Process, scratch};

/// The two implementations of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `iptables-legacy`: the kernel's ip_tables.
    Legacy,
    /// `iptables-nft`: the kernel's nf_tables.
    Nft,
}

impl Variant {
    /// Both variants.
    pub const BOTH: [Self; 2] = [Self::Legacy, Self::Nft];

    /// Returns the word in the names of the tools and in the agent's configuration.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

/// Tests that start an agent need these, beside `ip` and root.
pub const TOOLS: &[&str] = &[
    "etcd",
    "ipset",
    "iptables-legacy-restore",
    "ip6tables-legacy-restore",
    "iptables-legacy-save",
    "iptables-nft-restore",
    "ip6tables-nft-restore",
    "iptables-nft-save",
];

/// Returns whether the calling test is to run; see [`testkit::netns::require_root_and`].
///
/// # Panics
///
/// As that, and if the agent has not been built.
#[must_use]
pub fn end_to_end() -> bool {
    if !testkit::netns::require_root_and(TOOLS) {
        return false;
    }
    if let Err(error) = binary() {
        panic!("{error:#}");
    }
    if let Err(error) = testkit::netns::cleanup() {
        panic!("leftovers of an earlier run: {error:#}");
    }
    true
}

/// Returns the agent's binary: `FELIX_BINARY`, or what cargo has put beside the running program.
///
/// # Errors
///
/// If there is none.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FELIX_BINARY").map(PathBuf::from) {
        ensure!(path.is_file(), "FELIX_BINARY is {}, where there is no file", path.display());
        return Ok(path);
    }
    // target/PROFILE/demo or target/PROFILE/deps/acceptance-0123456789abcdef
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|directory| directory.join("calico-felix"));
    found.into_iter().find(|path| path.is_file()).with_context(|| {
        format!(
            "the agent is not built: no calico-felix beside {}; run `cargo build -p agent` with the same profile, \
             or set FELIX_BINARY",
            here.display()
        )
    })
}

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// The namespace that it serves.
    pub netns: &'a Netns,
    /// The name of its host in etcd.
    pub host: &'a str,
    /// The URL of etcd.
    pub etcd: &'a str,
    /// Which iptables it uses.
    pub variant: Variant,
    /// What it finds in front of its search path, if anything.
    pub path_prefix: Option<&'a Path>,
    /// Further variables of its environment, by their whole names.
    pub settings: &'a [(&'a str, &'a str)],
    /// Lines of shell that run before it, where it will run: the agent sees the mounts that they make, nobody else.
    pub before: &'a str,
}

/// A running agent; it is killed when this is dropped.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    log: PathBuf,
    _directory: TempDir,
}

impl Agent {
    /// Starts the agent with nothing configured but what `start` says.
    ///
    /// # Errors
    ///
    /// If there is no binary or it cannot be started.
    pub fn start(start: &Start<'_>) -> Result<Self> {
        Self::start_configured(start, &[])
    }

    /// Starts the agent with more parameters, by their names in the environment: `("FELIX_IPV6SUPPORT", "false")`.
    /// What it remembers is its own unless `FELIX_STATEDIRECTORY` says where.
    ///
    /// # Errors
    ///
    /// If there is no binary or it cannot be started.
    pub fn start_configured(start: &Start<'_>, parameters: &[(&str, &str)]) -> Result<Self> {
        let directory = scratch()?;
        let log = directory.path().join("log");
        let configuration = directory.path().join("felix.cfg");
        std::fs::write(&configuration, "[global]\n")?;
        let output = File::create(&log)?;
        let binary = binary()?;
        let mut command = start.netns.command("sh");
        command
            .args(["-ec", &format!("{}\nexec \"$0\" \"$@\"", start.before)])
            .arg(binary)
            .arg("--config-file")
            .arg(&configuration);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FELIX_")) {
            command.env_remove(name);
        }
        command
            .env("FELIX_FELIXHOSTNAME", start.host)
            .env("FELIX_ETCDENDPOINTS", start.etcd)
            .env("FELIX_IPTABLESBACKEND", start.variant.word())
            .env("FELIX_LOGSEVERITYSCREEN", "info")
            .env("FELIX_LOGFILEPATH", "none")
            .env("FELIX_STATEDIRECTORY", directory.path().join("state"))
            .envs(parameters.iter().copied());
        command.envs(start.settings.iter().copied());
        if let Some(prefix) = start.path_prefix {
            let rest = std::env::var_os("PATH").unwrap_or_default();
            let path = std::iter::once(prefix.to_path_buf()).chain(std::env::split_paths(&rest));
            command.env("PATH", std::env::join_paths(path)?);
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Self { process: Process::start(&mut command)?, log, _directory: directory })
    }

    /// Returns what the agent has logged.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned())
    }

    /// Returns whether the agent has not ended.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Kills the agent, wherever it is, and nothing that it has started; returns what it has logged.
    ///
    /// # Errors
    ///
    /// If it had ended before.
    pub fn kill(mut self) -> Result<String> {
        let log = self.log()?;
        ensure!(self.is_running()?, "the agent has ended by itself:\n{log}");
        drop(self.process);
        Ok(log)
    }

    /// Waits for a line that contains `text` and returns it.
    ///
    /// # Errors
    ///
    /// If there is none within `limit`.
    pub fn await_line(&self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let log = self.log()?;
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return Ok(line.to_owned());
            }
            ensure!(Instant::now() < deadline, "no line {text:?} within {limit:?}:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the agent the way a service manager does and returns what it has logged.
    ///
    /// # Errors
    ///
    /// If it does not end, or not with success.
    pub fn stop(mut self) -> Result<String> {
        let status = self.process.terminate(Duration::from_secs(10)).with_context(|| self.log().unwrap_or_default())?;
        let log = self.log()?;
        ensure!(status.success(), "the agent ended with {status} on SIGTERM:\n{log}");
        Ok(log)
    }
}
