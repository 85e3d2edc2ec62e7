//! Network namespaces for tests that need a kernel of their own.
//!
//! Two kinds. [`in_new_netns`] runs a closure on a thread whose namespace is fresh, has nothing but a loopback
//! interface, and ends with the thread: enough for the tests of a driver. [`Netns`] is a named namespace that other
//! namespaces can be joined to by veth pairs and that processes run in: what the end-to-end bed is made of.
//!
//! Invariants: a name carries the process that made it, so that parallel runs do not meet and [`cleanup`] can tell a
//! leftover from a neighbour; a namespace takes every process in it along when it goes; nothing outside the namespaces
//! that were made here is touched.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

/// What every namespace made by this project is called at first.
const PREFIX: &str = "felixtest-";

/// Where `ip netns` keeps the named namespaces (ip-netns(8)).
const NETNS_DIRECTORY: &str = "/run/netns";

/// A file system in memory, on most systems.
const MEMORY: &str = "/dev/shm";

/// The variable that selects tests; its value `pure` leaves out all that need root or tools.
pub const SELECTION: &str = "FELIX_TESTS";

/// Says whether a test that needs the kernel is to run, and leaves the calling test if not.
///
/// `testkit::kernel_test!("iptables-legacy", "ipset");` is the first line of every test that needs root or tools.
#[macro_export]
macro_rules! kernel_test {
    ($($tool:expr),* $(,)?) => {
        if !$crate::netns::require_root_and(&[$($tool),*]) {
            return;
        }
    };
}

/// Returns whether the calling test is to run: `false` if `FELIX_TESTS=pure` leaves it out.
///
/// # Panics
///
/// If the process is not root or one of `tools` is not installed: such a test fails, because a skipped test looks
/// like a passed one.
#[must_use]
pub fn require_root_and(tools: &[&str]) -> bool {
    if std::env::var_os(SELECTION).is_some_and(|value| value == "pure") {
        return false;
    }
    assert!(
        geteuid().is_root(),
        "this test makes network namespaces and needs root (`make test` as root, or {SELECTION}=pure to leave it out)"
    );
    let missing: Vec<&str> = tools.iter().copied().chain(["ip"]).filter(|tool| !is_installed(tool)).collect();
    assert!(
        missing.is_empty(),
        "this test needs {} in the path (`make setup` installs what is missing; {SELECTION}=pure leaves the test out)",
        missing.join(", ")
    );
    true
}

/// Returns whether `tool` is an executable somewhere in `PATH`.
#[must_use]
pub fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

/// Runs `test` on a thread with a fresh network namespace whose loopback is up; the namespace ends with the thread.
///
/// Children that `test` starts inherit the namespace. `/proc/sys/net` is that of the calling thread, but `/proc/net`
/// is that of the main thread: use `/proc/thread-self/net`.
///
/// # Panics
///
/// With the panic of `test`, or if the namespace cannot be made (not root).
pub fn in_new_netns<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    on_thread("netns", || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            panic!("no fresh network namespace: unshare(CLONE_NEWNET): {error}");
        }
        if let Err(error) = run(&mut Command::new("ip"), &["link", "set", "lo", "up"]) {
            panic!("no loopback in the fresh network namespace: {error:#}");
        }
        test()
    })
}

/// Runs `work` on a thread of its own and hands its panic on.
fn on_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
    let joined =
        std::thread::scope(|scope| match std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work) {
            Ok(thread) => thread.join(),
            Err(error) => panic!("no thread for {name}: {error}"),
        });
    joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A named network namespace; it is removed, and with it every process in it, when this is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with loopback up, named after this process, a counter and `label`.
    ///
    /// IPv6 addresses are usable at once (no duplicate address detection), and no ICMP error is held back by a rate
    /// limit, so that a refusal never looks like a drop.
    ///
    /// # Errors
    ///
    /// If `ip netns add` refuses, which needs root.
    pub fn new(label: &str) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{label}", std::process::id());
        run(&mut Command::new("ip"), &["netns", "add", &name])?;
        let netns = Self { name };
        netns.exec(&["ip", "link", "set", "lo", "up"])?;
        netns.sysctl(&[
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
        ])?;
        // Of a namespace since Linux 6.13, of the whole host before, where it is not ours to change.
        let per_namespace = ["net/ipv4/icmp_msgs_per_sec", "net/ipv4/icmp_msgs_burst"];
        for name in per_namespace {
            if netns.enter(|| Path::new("/proc/sys").join(name).exists()) {
                netns.sysctl(&[(name, "100000")])?;
            }
        }
        Ok(netns)
    }

    /// Returns the name, as `ip netns exec` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the file that stands for the namespace, as `nsenter --net=` takes it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIRECTORY).join(&self.name)
    }

    /// Returns a command that runs `program` in the namespace, with a `/sys` that shows the namespace.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs a program in the namespace and returns what it printed.
    ///
    /// # Errors
    ///
    /// If the program cannot be started or fails; the text has its standard error.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = split(words)?;
        run(&mut self.command(program), arguments)
    }

    /// Runs lines of shell in the namespace, stops at the first that fails, and returns what they printed.
    ///
    /// # Errors
    ///
    /// As [`Netns::exec`].
    pub fn sh(&self, script: &str) -> Result<String> {
        self.exec(&["sh", "-ec", script])
    }

    /// Writes kernel parameters of the namespace, in order; names are paths below `/proc/sys`.
    ///
    /// # Errors
    ///
    /// If a parameter does not exist or refuses the value.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (name, value) in settings {
                std::fs::write(Path::new("/proc/sys").join(name), value)
                    .with_context(|| format!("set {name} to {value} in {}", self.name))?;
            }
            Ok(())
        })
    }

    /// Starts a program in the namespace; its standard streams go nowhere.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn spawn(&self, words: &[&str]) -> Result<Process> {
        let (program, arguments) = split(words)?;
        let mut command = self.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Process::start(&mut command)
    }

    /// Runs `work` on a thread that is in the namespace, and returns what it returns.
    ///
    /// # Panics
    ///
    /// With the panic of `work`, or if the namespace is gone.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_thread(&self.name, || {
            if let Err(error) = self.enter_this_thread() {
                panic!("{error:#}");
            }
            work()
        })
    }

    /// Moves the calling thread into the namespace for the rest of its life.
    ///
    /// # Errors
    ///
    /// If the namespace is gone or the process is not root.
    pub fn enter_this_thread(&self) -> Result<()> {
        let file = File::open(self.path()).with_context(|| format!("namespace {}", self.name))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("setns to {}", self.name))
    }

    /// Waits until the kernel has seen that the other end of the interface is up too.
    ///
    /// Until then IPv6 has no routes on it; the kernel may take a second (net/core/link_watch.c).
    ///
    /// # Errors
    ///
    /// If the interface does not exist or is not up within ten seconds.
    pub fn await_up(&self, interface: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let line = self.exec(&["ip", "-br", "link", "show", "dev", interface])?;
            if line.split_ascii_whitespace().nth(1) == Some("UP") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} in {} does not come up: {line}", interface, self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Makes a veth pair between `name` here and `peer_name` in `peer`; both ends stay down.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, for example because a name is taken.
    pub fn veth(&self, name: &str, peer: &Self, peer_name: &str) -> Result<()> {
        let pair = ["link", "add", name, "netns", &self.name, "type", "veth", "peer", "name", peer_name];
        run(&mut Command::new("ip"), &[&pair[..], &["netns", &peer.name]].concat()).map(drop)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            complain(&format!("namespace {} stays behind: {error:#}", self.name));
        }
    }
}

/// Removes what dead runs of this project left behind: namespaces with the processes in them, scratch directories.
///
/// Returns the names of what was removed. What belongs to runs that live is left alone.
///
/// # Errors
///
/// If a leftover cannot be removed.
pub fn cleanup() -> Result<Vec<String>> {
    let namespaces = leftovers(Path::new(NETNS_DIRECTORY));
    // What is gone when removing it has failed was removed by another run that cleans up, too.
    for name in &namespaces {
        let removed = remove(name);
        if Path::new(NETNS_DIRECTORY).join(name).exists() {
            removed?;
        }
    }
    let mut names = namespaces;
    for base in [Path::new(MEMORY), &std::env::temp_dir()] {
        for name in leftovers(base) {
            let directory = base.join(&name);
            let removed = std::fs::remove_dir_all(&directory);
            if directory.exists() {
                removed.with_context(|| format!("remove {}", directory.display()))?;
            }
            names.push(name);
        }
    }
    Ok(names)
}

/// Returns what is in a directory that a dead run has made, in order; nothing if there is no such directory.
fn leftovers(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_leftover(name)).collect();
    names.sort();
    names
}

/// Makes an empty directory that goes when the value is dropped, in memory where the system has such a place.
///
/// # Errors
///
/// If there is no room for a directory.
pub fn scratch() -> Result<TempDir> {
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    builder.tempdir_in(MEMORY).or_else(|_| builder.tempdir()).context("a scratch directory")
}

/// Returns whether `name` was made by a run of this project that has ended.
fn is_leftover(name: &str) -> bool {
    // A process that has ended has no program any more, even while its parent has not yet taken note.
    let has_ended = |pid: u32| {
        let program = Path::new("/proc").join(pid.to_string()).join("exe");
        std::fs::read_link(program).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    };
    maker_of(name).is_some_and(has_ended)
}

/// Returns the process that made the namespace, if this project did.
fn maker_of(name: &str) -> Option<u32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

/// Ends the processes in the namespace and removes it.
fn remove(name: &str) -> Result<()> {
    for pid in processes_in(name)? {
        // Gone in the meantime is as good as killed.
        kill(pid, Signal::SIGKILL)
            .or_else(|error| if error == nix::errno::Errno::ESRCH { Ok(()) } else { Err(error) })?;
    }
    run(&mut Command::new("ip"), &["netns", "del", name]).map(drop)
}

/// Returns the processes in the namespace without this one, whose threads may be visiting.
fn processes_in(name: &str) -> Result<Vec<Pid>> {
    let listed = run(&mut Command::new("ip"), &["netns", "pids", name])?;
    let own = std::process::id();
    let pids = listed.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok()).filter(|&pid| pid != own);
    pids.map(|pid| Ok(Pid::from_raw(i32::try_from(pid)?))).collect()
}

/// A process that a test started; it is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts `command`.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { child })
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the handle, for its streams.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Returns whether the process has not ended.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends `signal`.
    ///
    /// # Errors
    ///
    /// If the process has been waited for already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("send {signal} to {pid}"))
    }

    /// Asks the process to end with `SIGTERM` and returns its exit status.
    ///
    /// # Errors
    ///
    /// If it has not ended after `limit`; it is killed then.
    pub fn terminate(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child.kill()?;
        bail!("process {} did not end within {limit:?} of SIGTERM: {}", self.child.id(), self.child.wait()?);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let ended = self.child.kill().and_then(|()| self.child.wait());
            if let Err(error) = ended {
                complain(&format!("process {} stays behind: {error}", self.child.id()));
            }
        }
    }
}

/// Returns the program and its arguments.
fn split<'a>(words: &'a [&'a str]) -> Result<(&'a str, &'a [&'a str])> {
    let (program, arguments) = words.split_first().context("no program to run")?;
    Ok((program, arguments))
}

/// Runs a command to its end and returns its standard output.
fn run(command: &mut Command, arguments: &[&str]) -> Result<String> {
    let output: Output =
        command.args(arguments).stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Tells whoever runs the tests about something that could not be cleaned up.
#[allow(clippy::print_stderr, reason = "a destructor has no other way to report; this is test support")]
fn complain(text: &str) {
    eprintln!("testkit: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_who_made_the_namespace() {
        let cases = [
            ("felixtest-4711-0-compute-1", Some(4711)),
            ("felixtest-1-17-x", Some(1)),
            ("felixtest-x-0-y", None),
            ("felixtest-12", None),
            ("somebody-4711-0-y", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(maker_of(name), expected, "{name}");
        }
    }

    #[test]
    fn a_fresh_namespace_has_nothing_but_a_loopback_that_answers() {
        kernel_test!();
        let seen = in_new_netns(|| {
            let links = run(&mut Command::new("ip"), &["-br", "link"]).unwrap();
            let listener = std::net::UdpSocket::bind("127.0.0.1:5000").unwrap();
            listener.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", "127.0.0.1:5000").unwrap();
            (links, listener.recv(&mut [0; 8]).unwrap())
        });
        assert!(seen.0.starts_with("lo "), "{}", seen.0);
        assert_eq!(seen.1, 1);
    }

    #[test]
    fn two_named_namespaces_are_joined_by_a_veth_pair_and_vanish_with_their_processes() {
        kernel_test!();
        let one = Netns::new("one").unwrap();
        let two = Netns::new("two").unwrap();
        one.veth("left", &two, "right").unwrap();
        one.sh("ip addr add 192.0.2.1/24 dev left; ip link set left up").unwrap();
        two.sh("ip addr add 192.0.2.2/24 dev right; ip link set right up").unwrap();
        let listener = one.enter(|| std::net::TcpListener::bind("192.0.2.1:80").unwrap());
        let stream = two.enter(|| std::net::TcpStream::connect("192.0.2.1:80").unwrap());
        assert_eq!(stream.local_addr().unwrap().ip().to_string(), "192.0.2.2");
        drop(listener);

        let mut sleeper = two.spawn(&["sleep", "60"]).unwrap();
        let path = two.path();
        assert!(path.exists());
        // The program is `ip netns exec` until that has entered the namespace.
        let deadline = Instant::now() + Duration::from_secs(5);
        while processes_in(two.name()).unwrap().is_empty() {
            assert!(Instant::now() < deadline, "the process did not enter the namespace");
        }
        drop(two);
        assert!(!path.exists());
        assert!(!sleeper.child().wait().unwrap().success());
    }

    #[test]
    fn cleanup_leaves_the_namespaces_of_living_runs_alone() {
        kernel_test!();
        let ours = Netns::new("alive").unwrap();
        cleanup().unwrap();
        assert!(ours.path().exists());
    }

    #[test]
    fn a_scratch_directory_is_a_leftover_once_its_maker_has_ended() {
        let mut ended = Command::new("true").spawn().unwrap();
        let dead = std::env::temp_dir().join(format!("{PREFIX}{}-abc", ended.id()));
        std::fs::create_dir(&dead).unwrap();
        ended.wait().unwrap();
        let ours = scratch().unwrap();
        assert!(is_leftover(dead.file_name().unwrap().to_str().unwrap()));
        assert!(!is_leftover(ours.path().file_name().unwrap().to_str().unwrap()));
        std::fs::remove_dir(&dead).unwrap();
    }

    #[test]
    fn a_failing_program_is_reported_with_what_it_said() {
        kernel_test!();
        let netns = Netns::new("errors").unwrap();
        let error = netns.exec(&["ip", "link", "set", "nosuch", "up"]).unwrap_err().to_string();
        assert!(error.contains("nosuch") && error.contains("Cannot find device"), "{error}");
    }
}
