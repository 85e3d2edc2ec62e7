//! The real binary as a child process, with nothing configured but what the test says.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use testkit::netns::Process;

/// How long anything may take that has no limit of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// A command that runs the binary without any variable that configures it.
pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_calico-felix"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["FELIX_", "ETCD_", "CALICO_", "DATASTORE_"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Runs the binary to its end with a config file of this text.
pub(crate) fn run(config: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("felix.cfg");
    std::fs::write(&file, config).unwrap();
    binary().arg("-c").arg(&file).args(arguments).envs(variables.iter().copied()).output().unwrap()
}

/// A running agent. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Agent {
    process: Process,
    log: PathBuf,
    _directory: TempDir,
}

impl Agent {
    /// Starts the agent for a host in the namespace of the calling thread.
    pub(crate) fn start(host: &str, etcd: &str, variables: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let output = File::create(&log).unwrap();
        let mut command = binary();
        command
            .arg(format!("--config-file={}", directory.path().join("absent.cfg").display()))
            .env("FELIX_FelixHostname", host)
            .env("felix_etcdendpoints", etcd)
            .env("FELIX_StateDirectory", directory.path().join("state"))
            .envs(variables.iter().copied())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        Self { process: Process::start(&mut command).unwrap(), log, _directory: directory }
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// Waits for a line that contains all of `parts` and returns it.
    pub(crate) fn await_line(&mut self, parts: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let running = self.process.is_running().unwrap();
            let log = self.log();
            if let Some(line) = log.lines().find(|line| parts.iter().all(|part| line.contains(part))) {
                return line.to_owned();
            }
            assert!(running, "the agent has ended without {parts:?}:\n{log}");
            assert!(Instant::now() < deadline, "no line with {parts:?}:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    /// Waits for its end; returns the exit code, how long that took, and the log.
    pub(crate) fn await_end(mut self) -> (Option<i32>, Duration, String) {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.process.child().try_wait().unwrap() {
                return (status.code(), begin.elapsed(), self.log());
            }
            assert!(begin.elapsed() < PATIENCE, "the agent does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops it as a service manager does; it must end with success, within a second.
    pub(crate) fn stop(self) -> String {
        self.signal(Signal::SIGTERM);
        let (code, took, log) = self.await_end();
        assert_eq!(code, Some(0), "{log}");
        assert!(took < Duration::from_secs(1), "it took {took:?} to stop:\n{log}");
        log
    }
}
