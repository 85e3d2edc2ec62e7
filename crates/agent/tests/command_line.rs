//! What the binary says to an operator who starts it by hand or with a wrong configuration.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

mod common;

use std::process::Output;

use common::{binary, run};

#[test]
fn help_and_version_answer_and_succeed() {
    for option in ["--help", "-h"] {
        let (code, stdout, stderr) = texts(&binary().arg(option).output().unwrap());
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{option}");
        for part in ["--config-file <FILE>", "/etc/calico/felix.cfg", "Exit codes:", "129", "SIGTERM"] {
            assert!(stdout.contains(part), "{option}: no {part:?} in\n{stdout}");
        }
    }
    let (code, stdout, _) = texts(&binary().arg("--version").output().unwrap());
    assert_eq!((code, stdout.as_str()), (Some(0), concat!("calico-felix ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn a_wrong_command_line_is_explained_and_fails_with_1() {
    for (arguments, part) in [
        (&["--no-such-option"][..], "--no-such-option"),
        (&["extra"], "extra"),
        (&["--log-format", "xml"], "xml"),
        (&["-c"], "--config-file"),
    ] {
        let (code, stdout, stderr) = texts(&binary().args(arguments).output().unwrap());
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{arguments:?}");
        assert!(stderr.contains(part) && stderr.contains("--help"), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_wrong_configuration_names_every_problem_and_where_it_is() {
    #[allow(clippy::type_complexity, reason = "rows of a table")]
    let cases: &[(&str, &[(&str, &str)], &[&str])] = &[
        ("[global]\nfoo\n", &[], &["felix.cfg", "line 2", "neither `=` nor `:`"]),
        ("[global\n", &[], &["line 1", "`]`"]),
        (
            "ChainInsertMode = prepend\n",
            &[],
            &["ChainInsertMode (config file)", "\"prepend\" is not one of insert, append"],
        ),
        ("InterfacePrefix = none\n", &[], &["InterfacePrefix (config file)", "`none` is not allowed"]),
        ("IptablesMarkMask = 0xf\n", &[], &["IptablesMarkMask", "five bits"]),
        (
            "MetadataPort = 70000\n",
            &[("FELIX_chaininsertMODE", "x")],
            &["MetadataPort (config file)", "ChainInsertMode (environment)"],
        ),
        ("DatastoreType = kubernetes\n", &[], &["DatastoreType", "kubernetes datastore is not supported"]),
        ("BPFEnabled = true\n", &[], &["BPFEnabled", "does not have that dataplane"]),
        ("EtcdKeyFile = /k\n", &[], &["EtcdKeyFile and EtcdCertFile belong together"]),
        ("EtcdAddr = h:1\n", &[("ETCD_DISCOVERY_SRV", "example.org")], &["exclude each other"]),
        (
            "EtcdEndpoints = https://127.0.0.1:1\nEtcdCaFile = /no/such/ca.pem\n",
            &[],
            &["CA file /no/such/ca.pem", "No such file"],
        ),
    ];
    for (config, variables, parts) in cases {
        let (code, _, stderr) = texts(&run(config, variables, &[]));
        assert_eq!(code, Some(1), "{config:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{config:?}: {stderr}");
        for part in *parts {
            assert!(stderr.contains(part), "{config:?}: no {part:?} in {stderr}");
        }
    }
}

#[test]
fn an_unreadable_config_file_is_not_an_absent_one() {
    let directory = tempfile::tempdir().unwrap();
    let (code, _, stderr) = texts(&binary().arg("-c").arg(directory.path()).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(stderr.contains("reading config file") && stderr.contains("directory"), "{stderr}");
}

#[test]
fn no_message_about_the_configuration_repeats_a_credential() {
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("EtcdEndpoints = https://root:hunter2@etcd:2379\n", &[]),
        ("EtcdAddr = root:hunter2@etcd:2379\n", &[]),
        ("EtcdPassword hunter2\n", &[]),
        ("ChainInsertMode = x\nEtcdPassword = hunter2\n", &[]),
        ("", &[("ETCD_ENDPOINTS", "https://root:hunter2@etcd:2379")]),
        ("", &[("FELIX_ETCDENDPOINTS", "https://root:hunter2@etcd:2379")]),
        ("ChainInsertMode = x\n", &[("ETCD_USERNAME", "root"), ("ETCD_PASSWORD", "hunter2")]),
    ];
    for (config, variables) in cases {
        let (code, stdout, stderr) = texts(&run(config, variables, &[]));
        assert_eq!(code, Some(1), "{config:?} {variables:?}: {stderr}");
        assert!(!stdout.contains("hunter2") && !stderr.contains("hunter2"), "{config:?} {variables:?}: {stderr}");
    }
}

fn texts(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}
