//! Connection settings and the calls made with them (datastore.md 10, crates.md 4.3).
//!
//! [`ConnectOptions`] come from the settings of the process; [`Connection`] is used by [`crate::watch`] and
//! [`crate::ready`]. A connection holds one client, for one endpoint at a time, and moves on to the next endpoint
//! when a call fails there (E2), so that logs can always say which member is in use. After a failure the client is
//! thrown away: the next attempt dials anew, reads the certificate files again and authenticates again.
//!
//! Invariants: every call has a time limit (E12); no credential reaches a log or an error text (I12).

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, Client, GetOptions, GetResponse, Identity, TlsOptions, WatchOptions, WatchStream};
use tokio::time::timeout;
use tracing::{debug, warn};

/// How to reach etcd.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `http(s)://host:port`, all with the same scheme; a final `/` is allowed (E-3).
    pub endpoints: Vec<String>,
    /// Set only if both user and password are configured (E-6).
    pub credentials: Option<Credentials>,
    pub tls: TlsFiles,
    pub limits: Limits,
}

impl ConnectOptions {
    /// Returns options for these endpoints, without user or certificates.
    pub fn new<S: Into<String>>(endpoints: impl IntoIterator<Item = S>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            credentials: None,
            tls: TlsFiles::default(),
            limits: Limits::default(),
        }
    }
}

/// An etcd user. Never printed.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// PEM files for `https` endpoints; ignored, with a warning if they are missing, for `http`.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Without it the roots of the system are trusted (E-7).
    pub ca: Option<PathBuf>,
    /// Certificate and key belong together.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// Time limits (E-9). The default is what the product uses.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connect: Duration,
    /// A silent server is asked for a sign of life this often. etcd refuses less than five seconds (E13).
    pub keep_alive_interval: Duration,
    /// A server that does not answer within this time is given up.
    pub keep_alive_timeout: Duration,
    /// One small read, the start of a watch.
    pub call: Duration,
    /// One page of a list, which may be megabytes over a slow line.
    pub page: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            keep_alive_interval: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(10),
            call: Duration::from_secs(10),
            page: Duration::from_secs(60),
        }
    }
}

/// The settings cannot work; retrying does not help, somebody has to change them.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("no etcd endpoint is configured")]
    NoEndpoint,
    #[error("etcd endpoint {endpoint}: {problem}")]
    Endpoint { endpoint: String, problem: &'static str },
    #[error("etcd endpoints mix http and https")]
    MixedSchemes,
    #[error("etcd client certificate and key must be configured together, only the {configured} is")]
    HalfAnIdentity { configured: &'static str },
    #[error("etcd {role} file {} cannot be read", path.display())]
    UnreadableFile {
        role: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("etcd {role} file {}: {problem}", path.display())]
    UnusableFile { role: &'static str, path: PathBuf, problem: &'static str },
    #[error("etcd certificate settings are refused ({files}): {problem}")]
    Tls { files: String, problem: String },
}

/// A call to etcd failed. Texts name the endpoint and never a credential.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The revision asked for is gone; only a new list helps (E6, E7).
    #[error("required revision has been compacted")]
    Compacted,
    /// Wrong, missing or insufficient credentials. Another endpoint of the same cluster would say the same.
    #[error("{endpoint}: etcd refuses access: {problem}")]
    Refused { endpoint: String, problem: String },
    #[error("{endpoint}: no answer within {limit:?} ({call})")]
    TimedOut { endpoint: String, call: &'static str, limit: Duration },
    #[error("{endpoint}: {call} failed: {problem}")]
    Failed { endpoint: String, call: &'static str, problem: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Checks endpoints and certificate files, so that a typing error stops the start instead of being retried for ever
/// (E-3, E-8).
pub(crate) async fn check(options: &ConnectOptions) -> Result<(), ConfigError> {
    let mut schemes = Vec::new();
    for endpoint in &options.endpoints {
        let fail = |problem| Err(ConfigError::Endpoint { endpoint: without_user_info(endpoint), problem });
        match check_endpoint(endpoint) {
            Ok(scheme) => schemes.push(scheme),
            Err(problem) => return fail(problem),
        }
    }
    let first = *schemes.first().ok_or(ConfigError::NoEndpoint)?;
    if schemes.iter().any(|scheme| *scheme != first) {
        return Err(ConfigError::MixedSchemes);
    }
    if first == Scheme::Http {
        let TlsFiles { ca, certificate, key } = &options.tls;
        for path in [ca, certificate, key].into_iter().flatten().filter(|path| !path.exists()) {
            warn!(path = %path.display(), "etcd certificate file does not exist; not needed for http endpoints");
        }
        return Ok(());
    }
    let endpoint = options.endpoints.first().map(String::as_str).unwrap_or_default();
    // Constructs everything and sends nothing: without a user, `connect` does not connect (E1).
    let trial = ConnectOptions { credentials: None, ..options.clone() };
    let client_options = client_options(&trial)?;
    match Client::connect([endpoint], Some(client_options)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(ConfigError::Tls { files: tls_files_text(&options.tls), problem: describe(&error) }),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

fn check_endpoint(endpoint: &str) -> Result<Scheme, &'static str> {
    let (scheme, rest) = if let Some(rest) = endpoint.strip_prefix("http://") {
        (Scheme::Http, rest)
    } else if let Some(rest) = endpoint.strip_prefix("https://") {
        (Scheme::Https, rest)
    } else {
        return Err("must begin with http:// or https://");
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains('@') {
        return Err("must not contain a user or password; configure them separately");
    }
    if authority.contains(['/', '?', '#']) {
        return Err("must be only scheme, host and port");
    }
    let (host, port) = authority.rsplit_once(':').ok_or("has no port")?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || (host.contains([':', '[', ']']) && !bracketed) || host.contains(char::is_whitespace) {
        return Err("has no valid host");
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(scheme),
        Ok(_) | Err(_) => Err("has no valid port"),
    }
}

/// For error texts: whatever stands before an `@` may be a password.
fn without_user_info(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((before, after)) => {
            let scheme = before.find("://").and_then(|at| before.get(..at + 3)).unwrap_or_default();
            format!("{scheme}***@{after}")
        }
        None => endpoint.to_owned(),
    }
}

fn client_options(options: &ConnectOptions) -> Result<etcd_client::ConnectOptions, ConfigError> {
    let limits = &options.limits;
    // A watch on a member that has lost its cluster would stay silent for ever; `require_leader` ends it.
    let mut out = etcd_client::ConnectOptions::new()
        .with_connect_timeout(limits.connect)
        .with_keep_alive(limits.keep_alive_interval, limits.keep_alive_timeout)
        .with_keep_alive_while_idle(false)
        .with_require_leader(true);
    if let Some(Credentials { user, password }) = &options.credentials {
        out = out.with_user(user, password).with_auto_token_refresh(true);
    }
    // TLS options together with an `http` endpoint are an error of the client library.
    if options.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")) {
        out = out.with_tls(tls_options(&options.tls)?);
    }
    Ok(out)
}

fn tls_options(files: &TlsFiles) -> Result<TlsOptions, ConfigError> {
    let mut tls = TlsOptions::new();
    match &files.ca {
        Some(path) => {
            tls = tls.ca_certificate(Certificate::from_pem(read_pem("CA", path, "CERTIFICATE-----")?));
        }
        None => tls = tls.with_enabled_roots(),
    }
    match (&files.certificate, &files.key) {
        (Some(certificate), Some(key)) => {
            let certificate = read_pem("client certificate", certificate, "CERTIFICATE-----")?;
            let key = read_pem("client key", key, "PRIVATE KEY-----")?;
            Ok(tls.identity(Identity::from_pem(certificate, key)))
        }
        (None, None) => Ok(tls),
        (Some(_), None) => Err(ConfigError::HalfAnIdentity { configured: "certificate" }),
        (None, Some(_)) => Err(ConfigError::HalfAnIdentity { configured: "key" }),
    }
}

fn read_pem(role: &'static str, path: &Path, marker: &str) -> Result<String, ConfigError> {
    let fail = |problem| ConfigError::UnusableFile { role, path: path.to_owned(), problem };
    let bytes =
        std::fs::read(path).map_err(|source| ConfigError::UnreadableFile { role, path: path.to_owned(), source })?;
    let text = String::from_utf8(bytes).map_err(|_| fail("is not PEM text"))?;
    if text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(fail("the key is encrypted with a pass phrase, which is not supported"));
    }
    if !text.contains("-----BEGIN ") || !text.contains(marker) {
        return Err(fail("holds no PEM block of the expected kind"));
    }
    Ok(text)
}

fn tls_files_text(files: &TlsFiles) -> String {
    let TlsFiles { ca, certificate, key } = files;
    let named = [("CA", ca), ("certificate", certificate), ("key", key)];
    let texts = named.iter().filter_map(|(role, path)| path.as_ref().map(|path| format!("{role} {}", path.display())));
    let text = texts.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "the system's CA certificates".to_owned() } else { text }
}

/// One client for one endpoint at a time. See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Connection {
    options: ConnectOptions,
    current: usize,
    client: Option<ConnectedClient>,
}

struct ConnectedClient {
    client: Client,
    /// Whether progress notifications of this server can be believed (E10); `None` until asked.
    sound_progress: Option<bool>,
}

impl fmt::Debug for ConnectedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectedClient").finish_non_exhaustive()
    }
}

impl Connection {
    /// Returns a connection that dials on first use.
    pub(crate) fn new(options: ConnectOptions) -> Self {
        Self { options, current: 0, client: None }
    }

    /// The endpoint in use.
    pub(crate) fn endpoint(&self) -> &str {
        self.options.endpoints.get(self.current).map(String::as_str).unwrap_or_default()
    }

    /// Leaves the endpoint in use, because a stream from it broke.
    pub(crate) fn give_up_endpoint(&mut self) {
        self.client = None;
        self.current = (self.current + 1) % self.options.endpoints.len().max(1);
    }

    /// Reads a key or, with options, a range. Tries each endpoint once.
    pub(crate) async fn get(
        &mut self,
        key: &[u8],
        options: Option<GetOptions>,
        limit: Duration,
    ) -> Result<GetResponse, CallError> {
        self.on_some_endpoint("read", limit, |client| {
            let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
            let options = options.clone();
            async move { kv.get(key, options).await }
        })
        .await
    }

    /// Starts a watch of a prefix. Tries each endpoint once. The caller waits for the first message, which says
    /// whether the watch was accepted.
    pub(crate) async fn watch(&mut self, prefix: &[u8], from_revision: i64) -> Result<WatchStream, CallError> {
        let limit = self.options.limits.call;
        self.on_some_endpoint("watch", limit, |client| {
            let options = WatchOptions::new()
                .with_prefix()
                .with_start_revision(from_revision)
                .with_progress_notify()
                .with_fragment();
            let mut watch = client.watch_client().max_decoding_message_size(usize::MAX);
            async move { watch.watch(prefix, Some(options)).await }
        })
        .await
    }

    /// Whether progress notifications of the server in use can be believed; false if it does not tell its version.
    pub(crate) async fn has_sound_progress(&mut self) -> bool {
        // Only an optimisation depends on it, so a slow answer counts as no.
        let limit = self.options.limits.call.min(Duration::from_secs(2));
        let Some(connected) = &mut self.client else {
            return false;
        };
        if let Some(known) = connected.sound_progress {
            return known;
        }
        let sound = match timeout(limit, connected.client.status()).await {
            Ok(Ok(status)) => progress_is_sound(status.version()),
            Ok(Err(_)) | Err(_) => false,
        };
        connected.sound_progress = Some(sound);
        sound
    }

    /// Time limit of a small call.
    pub(crate) fn limits(&self) -> &Limits {
        &self.options.limits
    }

    async fn on_some_endpoint<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &mut self,
        call: &'static str,
        limit: Duration,
        work: impl Fn(Client) -> F,
    ) -> Result<T, CallError> {
        let mut attempts = self.options.endpoints.len().max(1);
        loop {
            attempts -= 1;
            let result = self.on_current_endpoint(call, limit, &work).await;
            let error = match result {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match &error {
                CallError::Compacted | CallError::Config(_) => return Err(error),
                CallError::Refused { .. } => {
                    // A token may have expired with a restart of etcd; the next attempt logs in again (E15).
                    self.client = None;
                    return Err(error);
                }
                CallError::TimedOut { .. } | CallError::Failed { .. } => {
                    self.give_up_endpoint();
                    if attempts == 0 {
                        return Err(error);
                    }
                    debug!(%error, next = self.endpoint(), "trying the next etcd endpoint");
                }
            }
        }
    }

    async fn on_current_endpoint<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &mut self,
        call: &'static str,
        limit: Duration,
        work: &impl Fn(Client) -> F,
    ) -> Result<T, CallError> {
        let client = self.client().await?;
        let result = limited(limit, work(client)).await;
        self.classified(call, limit, result)
    }

    /// The client for the endpoint in use, made if there is none. With a user this logs in (E1).
    async fn client(&mut self) -> Result<Client, CallError> {
        if let Some(connected) = &self.client {
            return Ok(connected.client.clone());
        }
        let client_options = client_options(&self.options)?;
        let limit = self.options.limits.connect.max(self.options.limits.call);
        let endpoint = self.endpoint().to_owned();
        let result = limited(limit, Client::connect([endpoint], Some(client_options))).await;
        let client = self.classified("connect", limit, result)?;
        self.client = Some(ConnectedClient { client: client.clone(), sound_progress: None });
        Ok(client)
    }

    fn classified<T>(
        &self,
        call: &'static str,
        limit: Duration,
        result: Option<Result<T, etcd_client::Error>>,
    ) -> Result<T, CallError> {
        let endpoint = self.endpoint().to_owned();
        match result {
            None => Err(CallError::TimedOut { endpoint, call, limit }),
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => {
                let mut problem = describe(&error);
                if is_compaction(&problem) {
                    return Err(CallError::Compacted);
                }
                if is_refusal(&problem) {
                    return Err(CallError::Refused { endpoint, problem });
                }
                // The client library says only "operation was canceled" when the server hangs up during or right
                // after the handshake, typically because it wants a client certificate.
                if endpoint.starts_with("https://") && problem.contains("operation was canceled") {
                    problem.push_str(match self.options.tls.certificate {
                        None => " (the server closed the connection; no client certificate is configured)",
                        Some(_) => " (the server closed the connection; it may not accept our client certificate)",
                    });
                }
                Err(CallError::Failed { endpoint, call, problem })
            }
        }
    }
}

async fn limited<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    timeout(limit, work).await.ok()
}

/// The text of an error with its causes, each said once. The library's texts hold no credentials.
pub(crate) fn describe(error: &etcd_client::Error) -> String {
    let mut text = String::new();
    let mut add = |part: String| {
        if !part.is_empty() && !text.contains(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
    };
    let mut source: Option<&dyn std::error::Error> = None;
    if let etcd_client::Error::GRpcStatus(status) = error {
        add(format!("{:?}", status.code()));
        add(status.message().to_owned());
        source = std::error::Error::source(status);
    } else if let etcd_client::Error::TransportError(transport) = error {
        add(transport.to_string());
        source = std::error::Error::source(transport);
    } else {
        add(error.to_string());
    }
    while let Some(cause) = source {
        add(cause.to_string());
        source = cause.source();
    }
    text
}

/// E3 and E6 share a status code, so the text decides. The same text is used as reason of a cancelled watch.
pub(crate) fn is_compaction(text: &str) -> bool {
    text.contains("required revision has been compacted")
}

/// Login, token and permission problems (E1, E15, E16, E17).
pub(crate) fn is_refusal(text: &str) -> bool {
    const TEXTS: [&str; 6] = [
        "authentication failed",
        "user name is empty",
        "invalid auth token",
        "permission denied",
        "Unauthenticated",
        "PermissionDenied",
    ];
    TEXTS.iter().any(|refusal| text.contains(refusal))
}

/// From 3.4.25 and 3.5.8 on a progress notification cannot overtake events (E10).
fn progress_is_sound(version: &str) -> bool {
    let numbers = version.split(['.', '-', '+']).take(3).map(str::parse::<u32>).collect::<Result<Vec<_>, _>>();
    match numbers.as_deref() {
        Ok([3, 4, patch]) => *patch >= 25,
        Ok([3, 5, patch]) => *patch >= 8,
        Ok([major, minor, _]) => (*major, *minor) > (3, 5),
        Ok(_) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_scheme_host_and_port_and_nothing_else() {
        for good in ["http://a:2379", "https://a.b-c:1/", "http://10.0.0.1:65535", "http://[fd00::1]:2379/"] {
            assert!(check_endpoint(good).is_ok(), "{good}");
        }
        let bad = [
            "a:2379",
            "ftp://a:1",
            "http://",
            "http://a",
            "http://a:",
            "http://a:0",
            "http://a:65536",
            "http://:2379",
            "http://fd00::1:2379",
            "http://a:1/x",
            "http://a:1?x",
            "http://a:1#x",
            "http://u:p@a:1",
            "http://a b:1",
        ];
        for bad in bad {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn errors_about_endpoints_do_not_repeat_passwords() {
        for endpoint in ["https://u:secret@a:1", "https://u:sec@ret@a:1", "u:secret@a:1"] {
            let error = check(&ConnectOptions::new([endpoint])).await.unwrap_err();
            let text = format!("{error} {error:?}");
            assert!(!text.contains("sec"), "{text}");
            assert!(text.contains("a:1"), "{text}");
        }
    }

    #[test]
    fn options_print_no_credentials() {
        let mut options = ConnectOptions::new(["http://a:1"]);
        options.credentials = Some(Credentials { user: "felix-user".into(), password: "secret".into() });
        let text = format!("{options:?}{:?}", Connection::new(options.clone()));
        assert!(!text.contains("secret") && !text.contains("felix-user"), "{text}");
    }

    #[tokio::test]
    async fn one_scheme_for_all_endpoints() {
        let error = check(&ConnectOptions::new(["http://a:1", "https://b:1"])).await.unwrap_err();
        assert!(matches!(error, ConfigError::MixedSchemes), "{error}");
        let none: [&str; 0] = [];
        let error = check(&ConnectOptions::new(none)).await.unwrap_err();
        assert!(matches!(error, ConfigError::NoEndpoint), "{error}");
    }

    /// The other part of H-7, status keys that vanish, comes with the status writer.
    #[tokio::test]
    async fn h_07_unusable_certificate_files_refuse_to_start_and_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let missing = dir.path().join("missing.pem");
        let empty = file("empty.pem", "");
        let encrypted = file("encrypted.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nx\n");
        let garbage = file("garbage.pem", "-----BEGIN CERTIFICATE-----\n####\n-----END CERTIFICATE-----\n");
        let ca = |path: &PathBuf| TlsFiles { ca: Some(path.clone()), ..TlsFiles::default() };
        let pair = |certificate: Option<&PathBuf>, key: Option<&PathBuf>| TlsFiles {
            ca: None,
            certificate: certificate.cloned(),
            key: key.cloned(),
        };
        let cases = [
            (ca(&missing), "missing.pem cannot be read"),
            (ca(&empty), "empty.pem: holds no PEM block"),
            (ca(&garbage), "garbage.pem"),
            (pair(Some(&garbage), None), "only the certificate is"),
            (pair(None, Some(&garbage)), "only the key is"),
            (pair(Some(&garbage), Some(&encrypted)), "encrypted with a pass phrase"),
            (pair(Some(&garbage), Some(&garbage)), "garbage.pem: holds no PEM block"),
        ];
        for (tls, expected) in cases {
            let mut options = ConnectOptions::new(["https://localhost:1"]);
            options.tls = tls;
            let error = check(&options).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
    }

    #[tokio::test]
    async fn certificate_files_do_not_matter_for_http() {
        let mut options = ConnectOptions::new(["http://localhost:1"]);
        options.tls.ca = Some("/nowhere/ca.pem".into());
        check(&options).await.unwrap();
        client_options(&options).unwrap();
    }

    #[test]
    fn progress_is_believed_from_the_fixed_releases_on() {
        let cases = [
            ("3.4.23", false),
            ("3.4.24", false),
            ("3.4.25", true),
            ("3.5.7", false),
            ("3.5.8", true),
            ("3.5.21", true),
            ("3.6.0", true),
            ("3.6.0-rc.1", true),
            ("3.3.27", false),
            ("4.0.0", true),
            ("", false),
            ("unknown", false),
        ];
        for (version, expected) in cases {
            assert_eq!(progress_is_sound(version), expected, "{version}");
        }
    }
}
