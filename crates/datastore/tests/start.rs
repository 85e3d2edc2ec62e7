//! Before the first list: waiting for readiness, users, and certificates, against a real etcd server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use datastore::{CallError, ConnectOptions, Credentials, Datastore, RESOURCES, RawConfig, TlsFiles, Waiting};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use support::{Follower, Log, options, tier, tier_value};
use testkit::etcd::Etcd;

/// What was being waited for, each time it changed.
type Reasons = Arc<Mutex<Vec<String>>>;

#[tokio::test]
async fn nothing_begins_before_the_ready_flag_is_set() {
    let (log, _guard) = Log::record();
    let Some(mut etcd) = Etcd::for_test() else { return };
    let datastore = Datastore::new(options([etcd.endpoint()])).await.unwrap();
    etcd.kill();
    let (task, reasons) = wait_ready(datastore);
    until(&reasons, "etcd cannot be read").await;
    etcd.restart().unwrap();
    until(&reasons, "does not exist").await;

    let information = format!("{RESOURCES}clusterinformations/default");
    for (value, reason) in [
        (json!({"spec": {"clusterType": "openstack", "datastoreReady": false}}).to_string(), "is not true"),
        ("no json".to_owned(), "is invalid"),
        (json!({"spec": {"clusterType": "openstack"}}).to_string(), "is not true"),
    ] {
        reasons.lock().unwrap().clear();
        etcd.put(&information, &value).unwrap();
        until(&reasons, reason).await;
        // Long enough for further attempts.
        tokio::time::sleep(Duration::from_millis(2_500)).await;
    }
    assert_eq!(log.lines_with("invalid resource treated as absent").len(), 1, "once, not with every attempt");
    // Five states; a starting etcd may refuse in more than one way.
    let lines = log.lines_with("waiting_for=");
    assert!((5..=8).contains(&lines.len()), "one line for each change: {lines:?}");
    let configuration = |name: &str| format!("{RESOURCES}felixconfigurations/{name}");
    etcd.put(&configuration("default"), &json!({"spec": {"interfacePrefix": "tap"}}).to_string()).unwrap();
    etcd.put(&configuration("node.host-a"), &json!({"spec": {"logSeverityScreen": "Debug"}}).to_string()).unwrap();
    etcd.put(&configuration("node.host-b"), &json!({"spec": {"logSeverityScreen": "Error"}}).to_string()).unwrap();
    assert!(!task.is_finished());
    etcd.put(&information, &json!({"spec": {"clusterType": "openstack", "datastoreReady": true}}).to_string()).unwrap();

    let RawConfig { cluster_information, default, node } = task.await.unwrap();
    let value = |map: &std::collections::BTreeMap<String, String>, wanted: &str| {
        map.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.clone())
    };
    assert_eq!(value(&cluster_information, "ClusterType").as_deref(), Some("openstack"));
    assert_eq!(value(&default, "InterfacePrefix").as_deref(), Some("tap"));
    assert_eq!(value(&node, "LogSeverityScreen").as_deref(), Some("Debug"));
}

#[tokio::test]
async fn configuration_that_is_missing_or_damaged_is_empty() {
    let Some(etcd) = Etcd::for_test() else { return };
    let ready = json!({"spec": {"datastoreReady": true}}).to_string();
    etcd.put(&format!("{RESOURCES}clusterinformations/default"), &ready).unwrap();
    etcd.put(&format!("{RESOURCES}felixconfigurations/default"), "{").unwrap();
    let datastore = Datastore::new(options([etcd.endpoint()])).await.unwrap();
    let config = datastore.wait_ready("host-a").await;
    assert!(config.default.is_empty() && config.node.is_empty(), "{config:?}");
}

#[tokio::test]
async fn users_are_told_apart() {
    let Some(etcd) = Etcd::for_test() else { return };
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    let ready = json!({"spec": {"datastoreReady": true}}).to_string();
    etcd.put(&format!("{RESOURCES}clusterinformations/default"), &ready).unwrap();
    enable_users(&etcd);

    let with_user = |user: &str, password: &str| {
        let mut options = options([etcd.endpoint()]);
        options.credentials = Some(Credentials { user: user.into(), password: password.into() });
        options
    };
    let mut follower = Follower::start(with_user("felix", "felix-secret"), 10).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    assert_eq!(follower.seen.tiers.len(), 1);

    let refused = [
        (with_user("felix", "wrong-secret"), "authentication failed"),
        (with_user("other", "other-secret"), "permission denied"),
        (options([etcd.endpoint()]), "user name is empty"),
    ];
    for (options, reason) in refused {
        let (task, reasons) = wait_ready(Datastore::new(options).await.unwrap());
        let text = until(&reasons, reason).await;
        assert!(text.contains("refuses access"), "{text}");
        assert!(!text.contains("secret"), "{text}");
        task.abort();
    }
}

#[tokio::test]
async fn certificates_are_checked_by_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca");
    let server = authority.issue("server");
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let arguments = [
        format!("--cert-file={}", path(&server.0)),
        format!("--key-file={}", path(&server.1)),
        format!("--trusted-ca-file={}", path(&authority.file)),
        "--client-cert-auth".to_owned(),
    ];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(etcd) = Etcd::for_test_with(Some("https://127.0.0.1"), &arguments) else { return };
    etcd.put(&tier("a"), &tier_value(1)).unwrap();
    let endpoint = etcd.extra_endpoint().unwrap().to_owned();

    let with_files = |ca: &Path, identity: Option<&(PathBuf, PathBuf)>, endpoint: &str| -> ConnectOptions {
        let mut options = options([endpoint.to_owned()]);
        options.tls = TlsFiles {
            ca: Some(ca.to_owned()),
            certificate: identity.map(|(certificate, _)| certificate.clone()),
            key: identity.map(|(_, key)| key.clone()),
        };
        options
    };
    let client = authority.issue("client");
    let mut follower = Follower::start(with_files(&authority.file, Some(&client), &endpoint), 10).await;
    follower.until("in sync", |seen| seen.is_in_sync()).await;
    assert_eq!(follower.seen.tiers.len(), 1);

    let stranger = Authority::new(dir.path(), "stranger");
    let not_ours = stranger.issue("not-ours");
    let other_name = endpoint.replace("127.0.0.1", "127.0.0.2");
    let refused = [
        (with_files(&stranger.file, Some(&client), &endpoint), "UnknownIssuer"),
        (with_files(&authority.file, None, &endpoint), "no client certificate is configured"),
        (with_files(&authority.file, Some(&not_ours), &endpoint), "may not accept our client certificate"),
        // Nothing listens there, but the error must not be about certificates.
        (with_files(&authority.file, Some(&client), &other_name), "connect"),
    ];
    for (options, reason) in refused {
        let (task, reasons) = wait_ready(Datastore::new(options).await.unwrap());
        let text = until(&reasons, reason).await;
        assert!(text.contains("https://127.0.0."), "names the endpoint: {text}");
        task.abort();
    }

    // A certificate and a key that do not belong together refuse to start.
    let mixed = (client.0.clone(), server.1.clone());
    let error = Datastore::new(with_files(&authority.file, Some(&mixed), &endpoint)).await.unwrap_err().to_string();
    assert!(error.contains("client.pem") && error.contains("server-key.pem"), "{error}");
}

/// A certificate that is renewed on disk is used from the next connection on.
#[tokio::test]
async fn the_name_of_the_server_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca");
    let (certificate, key) = authority.issue_for("elsewhere", vec!["etcd.example.org".to_owned()]);
    let arguments = [format!("--cert-file={}", certificate.display()), format!("--key-file={}", key.display())];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(etcd) = Etcd::for_test_with(Some("https://127.0.0.1"), &arguments) else { return };
    let mut options = options([etcd.extra_endpoint().unwrap().to_owned()]);
    options.tls.ca = Some(authority.file.clone());
    let (task, reasons) = wait_ready(Datastore::new(options).await.unwrap());
    until(&reasons, "not valid for name").await;
    task.abort();
}

fn wait_ready(datastore: Datastore) -> (tokio::task::JoinHandle<RawConfig>, Reasons) {
    let reasons = Reasons::default();
    let log = Arc::clone(&reasons);
    let task = tokio::spawn(async move {
        datastore
            .wait_ready_with("host-a", |waiting: &Waiting| {
                if let Waiting::Unreachable(CallError::Config(error)) = waiting {
                    panic!("settings were checked before: {error}");
                }
                log.lock().unwrap().push(waiting.to_string());
            })
            .await
    });
    (task, reasons)
}

/// Waits for a reason that contains `text` and returns it.
async fn until(reasons: &Reasons, text: &str) -> String {
    for _ in 0..600 {
        let found = reasons.lock().unwrap().iter().find(|reason| reason.contains(text)).cloned();
        if let Some(found) = found {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no reason contains {text:?}: {:?}", reasons.lock().unwrap());
}

/// Makes users `root`, `felix` (may read resources) and `other` (may read nothing), and makes them necessary.
fn enable_users(etcd: &Etcd) {
    // `/calico/resources/` and the key after its last, in base64, which is what the gateway takes.
    let (key, end) = ("L2NhbGljby9yZXNvdXJjZXMv", "L2NhbGljby9yZXNvdXJjZXMw");
    for (user, password) in [("root", "root-secret"), ("felix", "felix-secret"), ("other", "other-secret")] {
        etcd.call("auth/user/add", &json!({"name": user, "password": password})).unwrap();
    }
    for role in ["root", "reader"] {
        etcd.call("auth/role/add", &json!({"name": role})).unwrap();
    }
    let permission = json!({"permType": "READ", "key": key, "range_end": end});
    etcd.call("auth/role/grant", &json!({"name": "reader", "perm": permission})).unwrap();
    for (user, role) in [("root", "root"), ("felix", "reader")] {
        etcd.call("auth/user/grant", &json!({"user": user, "role": role})).unwrap();
    }
    etcd.call("auth/enable", &json!({})).unwrap();
}

/// A certificate authority with its files.
struct Authority {
    dir: PathBuf,
    file: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let file = dir.join(format!("{name}.pem"));
        fs::write(&file, issuer.pem()).unwrap();
        Self { dir: dir.to_owned(), file, issuer }
    }

    /// Returns the files of a new certificate for the loopback address, and of its key.
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        self.issue_for(name, vec!["127.0.0.1".to_owned()])
    }

    fn issue_for(&self, name: &str, subjects: Vec<String>) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(subjects).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let pair = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&pair, &self.issuer).unwrap();
        let files = (self.dir.join(format!("{name}.pem")), self.dir.join(format!("{name}-key.pem")));
        fs::write(&files.0, certificate.pem()).unwrap();
        fs::write(&files.1, pair.serialize_pem()).unwrap();
        files
    }
}
