//! A real etcd server on loopback, for tests and demonstrations.
//!
//! Each [`Etcd`] is a child process with ports and a data directory of its own, in memory where possible (an fsync
//! per write would be what a test measures, performance.md 4.8). Dropping it kills the child and removes the data.
//! Data is written through the JSON gateway of etcd with blocking calls of a few hundred microseconds, so that this
//! works in synchronous and asynchronous tests alike and independently of the client under test.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::SELECTION;

/// Operations per transaction; etcd's limit is 128 (crates.md E19).
const CHUNK: usize = 100;

/// How long a start may take before it counts as failed.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Starts that may collide with another process on a port before giving up.
const START_ATTEMPTS: usize = 5;

/// A running server. See the [module documentation](self).
#[derive(Debug)]
pub struct Etcd {
    child: Option<Child>,
    data: TempDir,
    client_port: u16,
    peer_port: u16,
    extra_url: Option<String>,
    arguments: Vec<OsString>,
}

impl Etcd {
    /// Starts a server for a test; `None` if `FELIX_TESTS=pure` leaves the test out.
    ///
    /// # Panics
    ///
    /// If that is not so and the server cannot be started.
    pub fn for_test() -> Option<Self> {
        Self::for_test_with(None, &[])
    }

    /// Like [`Self::for_test`], with the arguments of [`Self::start_with`].
    ///
    /// # Panics
    ///
    /// As [`Self::for_test`].
    pub fn for_test_with(extra_url: Option<&str>, arguments: &[&str]) -> Option<Self> {
        if std::env::var_os(SELECTION).is_some_and(|selection| selection == "pure") {
            return None;
        }
        match Self::start_with(extra_url, arguments) {
            Ok(etcd) => Some(etcd),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Starts a server and waits until it answers.
    ///
    /// # Errors
    ///
    /// If etcd is not installed or does not become healthy; the text holds the end of its log.
    pub fn start() -> Result<Self> {
        Self::start_with::<&str>(None, &[])
    }

    /// Starts a server with further command line arguments and, beside the plain one, a client URL such as
    /// `https://127.0.0.1` (the port is chosen and can be read from [`Self::extra_endpoint`]).
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_with<S: Into<OsString> + Clone>(extra_url: Option<&str>, arguments: &[S]) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("testkit-etcd-");
        let data = if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() };
        let mut etcd = Self {
            child: None,
            data: data.context("making a data directory for etcd")?,
            client_port: 0,
            peer_port: 0,
            extra_url: None,
            arguments: arguments.iter().cloned().map(Into::into).collect(),
        };
        let mut attempts = START_ATTEMPTS;
        loop {
            attempts -= 1;
            let [client_port, peer_port, extra_port] = free_ports()?;
            etcd.client_port = client_port;
            etcd.peer_port = peer_port;
            etcd.extra_url = extra_url.map(|url| format!("{url}:{extra_port}"));
            match etcd.resume_or_start() {
                Ok(()) => return Ok(etcd),
                // Between choosing a port and using it another process may take it.
                Err(error) if attempts > 0 && format!("{error:#}").contains("address already in use") => etcd.kill(),
                Err(error) => return Err(error),
            }
        }
    }

    /// `http://127.0.0.1:<port>`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// The further URL asked for at the start.
    pub fn extra_endpoint(&self) -> Option<&str> {
        self.extra_url.as_deref()
    }

    /// Process id of the running server.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills the server as a crash would; data and ports are kept for [`Self::restart`].
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // A child that has ended by itself is as good as killed.
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Starts the server again where [`Self::kill`] left it, or at once if it still runs.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.resume_or_start()
    }

    /// Kills the server, removes its data and starts it empty on the same ports, which is what the loss of a cluster
    /// looks like to a client.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn restart_empty(&mut self) -> Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.data.path().join("data")).context("removing etcd's data")?;
        self.resume_or_start()
    }

    /// Freezes the server: its connections stay open and nothing answers.
    ///
    /// # Errors
    ///
    /// If the server does not run.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Ends [`Self::freeze`].
    ///
    /// # Errors
    ///
    /// If the server does not run.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Writes a key and returns the revision.
    ///
    /// # Errors
    ///
    /// If the server does not answer or refuses.
    pub fn put(&self, key: &str, value: &str) -> Result<i64> {
        revision(&self.call("kv/put", &json!({"key": BASE64.encode(key), "value": BASE64.encode(value)}))?)
    }

    /// Reads a key.
    ///
    /// # Errors
    ///
    /// If the server does not answer or the value is not text.
    pub fn get(&self, key: &str) -> Result<Option<String>> {
        let reply = self.call("kv/range", &json!({"key": BASE64.encode(key)}))?;
        Ok(key_values(&reply)?.into_values().next())
    }

    /// Reads all keys with a prefix.
    ///
    /// # Errors
    ///
    /// If the server does not answer or a key or value is not text.
    pub fn get_prefix(&self, prefix: &str) -> Result<BTreeMap<String, String>> {
        key_values(&self.call("kv/range", &prefix_range(prefix))?)
    }

    /// Deletes a key and returns the revision.
    ///
    /// # Errors
    ///
    /// If the server does not answer or refuses.
    pub fn delete(&self, key: &str) -> Result<i64> {
        revision(&self.call("kv/deleterange", &json!({"key": BASE64.encode(key)}))?)
    }

    /// Deletes all keys with a prefix, in one revision, and returns it.
    ///
    /// # Errors
    ///
    /// If the server does not answer or refuses.
    pub fn delete_prefix(&self, prefix: &str) -> Result<i64> {
        revision(&self.call("kv/deleterange", &prefix_range(prefix))?)
    }

    /// Forgets the history before a revision.
    ///
    /// # Errors
    ///
    /// If the server does not answer or the revision is compacted already or not reached yet.
    pub fn compact(&self, revision: i64) -> Result<()> {
        self.call("kv/compaction", &json!({"revision": revision.to_string(), "physical": true})).map(drop)
    }

    /// The current revision of the store.
    ///
    /// # Errors
    ///
    /// If the server does not answer.
    pub fn revision(&self) -> Result<i64> {
        revision(&self.call("kv/range", &json!({"key": BASE64.encode("\0")}))?)
    }

    /// Writes many keys, a hundred to a transaction.
    ///
    /// # Errors
    ///
    /// If the server does not answer or refuses.
    pub fn put_all<K: AsRef<str>, V: AsRef<str>>(&self, pairs: impl IntoIterator<Item = (K, V)>) -> Result<()> {
        let operation = |(key, value): (K, V)| {
            let (key, value) = (BASE64.encode(key.as_ref()), BASE64.encode(value.as_ref()));
            json!({"requestPut": {"key": key, "value": value}})
        };
        let mut operations = Vec::new();
        for pair in pairs {
            operations.push(operation(pair));
            if operations.len() == CHUNK {
                self.call("kv/txn", &json!({"success": std::mem::take(&mut operations)}))?;
            }
        }
        if !operations.is_empty() {
            self.call("kv/txn", &json!({"success": operations}))?;
        }
        Ok(())
    }

    /// Writes what a file of the Neutron vectors holds: a list of `{"key": …, "value": …}`. Returns the keys.
    ///
    /// # Errors
    ///
    /// If the text is not such a list or the server does not take it.
    pub fn load(&self, json: &str) -> Result<Vec<String>> {
        let items: Vec<Value> = serde_json::from_str(json).context("parsing a list of key and value")?;
        let field = |item: &Value, name: &str| {
            item.get(name).and_then(Value::as_str).map(str::to_owned).with_context(|| format!("no {name} in {item}"))
        };
        let pairs = items.iter().map(|item| Ok((field(item, "key")?, field(item, "value")?)));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        self.put_all(pairs.iter().map(|(key, value)| (key, value)))?;
        Ok(pairs.into_iter().map(|(key, _)| key).collect())
    }

    /// Calls any method of the JSON gateway, such as `auth/enable`; keys and values are base64.
    ///
    /// # Errors
    ///
    /// If the server does not answer or refuses.
    pub fn call(&self, path: &str, request: &Value) -> Result<Value> {
        let body = request.to_string();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.client_port));
        let mut stream = TcpStream::connect(address).context("connecting to etcd")?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).context("setting a time limit")?;
        // HTTP/1.0: the reply is neither chunked nor followed by anything.
        let head = format!("POST /v3/{path} HTTP/1.0\r\nHost: etcd\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).context("asking etcd")?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).context("reading the answer of etcd")?;
        let reply = String::from_utf8(reply).context("answer of etcd")?;
        let (head, body) = reply.split_once("\r\n\r\n").context("answer of etcd has no end of header")?;
        let status = head.lines().next().unwrap_or_default();
        ensure!(status.contains(" 200 "), "etcd answers {path} with {status}: {body}");
        serde_json::from_str(body).with_context(|| format!("answer of etcd to {path}"))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("etcd does not run")?;
        let pid = Pid::from_raw(i32::try_from(child.id()).context("process id of etcd")?);
        kill(pid, signal).with_context(|| format!("sending {signal} to etcd"))
    }

    fn resume_or_start(&mut self) -> Result<()> {
        let log_path = self.data.path().join("log");
        let log = File::create(&log_path).context("making a log file for etcd")?;
        let mut client_urls = self.endpoint();
        if let Some(url) = &self.extra_url {
            client_urls.push(',');
            client_urls.push_str(url);
        }
        let peer_url = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new("etcd");
        command
            // Variables such as ETCD_LISTEN_CLIENT_URLS would get in the way.
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| name == "PATH"))
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .args(["--name", "testkit", "--log-outputs", "stderr", "--logger", "zap"])
            .args(["--listen-client-urls", &client_urls, "--advertise-client-urls", &client_urls])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("testkit={peer_url}")])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().context(
            "starting etcd: this test needs a real etcd server (Debian: `apt-get install etcd-server`); \
             set FELIX_TESTS=pure to leave such tests out",
        )?;
        self.child = Some(child);
        self.wait_healthy()
            .with_context(|| format!("etcd does not become healthy; its log ends with:\n{}", tail(&log_path)))
    }

    fn wait_healthy(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().context("asking for the state of etcd")?
            {
                self.child = None;
                bail!("etcd ended with {status}");
            }
            // A linearizable read answers only when there is a leader.
            let error = match self.revision() {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns ports that were free a moment ago.
fn free_ports() -> Result<[u16; 3]> {
    // All are held until all are chosen, so that they differ.
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("choosing a port");
    let listeners = [listen()?, listen()?, listen()?];
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr().context("choosing a port")?.port();
    }
    Ok(ports)
}

fn prefix_range(prefix: &str) -> Value {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    json!({"key": BASE64.encode(prefix), "range_end": BASE64.encode(end)})
}

fn revision(reply: &Value) -> Result<i64> {
    let revision = reply.pointer("/header/revision").and_then(Value::as_str);
    revision.with_context(|| format!("no revision in {reply}"))?.parse().context("revision")
}

fn key_values(reply: &Value) -> Result<BTreeMap<String, String>> {
    let text = |kv: &Value, field: &str| {
        let encoded = kv.get(field).and_then(Value::as_str).unwrap_or_default();
        let bytes = BASE64.decode(encoded).context("answer of etcd is not base64")?;
        String::from_utf8(bytes).with_context(|| format!("{field} in etcd is not text"))
    };
    let kvs = reply.get("kvs").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    kvs.iter().map(|kv| Ok((text(kv, "key")?, text(kv, "value")?))).collect()
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_outlives_a_crash_and_not_the_loss_of_the_cluster() {
        let Some(mut etcd) = Etcd::for_test() else { return };
        etcd.put("/a", "1").unwrap();
        let put = etcd.put("/a/b", "ü\n\"").unwrap();
        assert_eq!(etcd.revision().unwrap(), put);
        etcd.kill();
        assert!(etcd.get("/a").is_err());
        etcd.restart().unwrap();
        assert_eq!(etcd.get("/a/b").unwrap().as_deref(), Some("ü\n\""));
        assert_eq!(etcd.get_prefix("/a/").unwrap().len(), 1);
        assert_eq!(etcd.delete("/a").unwrap(), put + 1);
        assert_eq!(etcd.get("/a").unwrap(), None);
        etcd.restart_empty().unwrap();
        assert!(etcd.get_prefix("/").unwrap().is_empty());
    }

    #[test]
    fn many_keys_are_loaded_in_transactions() {
        let Some(etcd) = Etcd::for_test() else { return };
        let before = etcd.revision().unwrap();
        etcd.put_all((0..1_050).map(|n| (format!("/n/{n}"), "x"))).unwrap();
        assert_eq!(etcd.revision().unwrap(), before + 11);
        assert_eq!(etcd.get_prefix("/n/").unwrap().len(), 1_050);
        assert_eq!(etcd.load(r#"[{"key": "/v", "value": "{}"}]"#).unwrap(), ["/v"]);
        assert_eq!(etcd.get("/v").unwrap().as_deref(), Some("{}"));
        let last = etcd.delete_prefix("/n/").unwrap();
        etcd.compact(last).unwrap();
        assert!(etcd.compact(last).is_err(), "compacted already");
    }

    #[test]
    fn nothing_is_left_of_a_dropped_server() {
        let Some(etcd) = Etcd::for_test() else { return };
        let data = etcd.data.path().to_owned();
        let process = format!("/proc/{}", etcd.pid().unwrap());
        assert!(data.exists() && Path::new(&process).exists());
        drop(etcd);
        assert!(!data.exists() && !Path::new(&process).exists());
    }
}
