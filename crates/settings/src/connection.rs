//! How to reach the datastore (operations.md 2.5, datastore.md 10).
//!
//! Fed by variables that all Calico programs share, and by parameters that beat them; feeds the
//! client of the datastore.

use std::fmt;

use crate::raw::Source;
use crate::resolve::{Invalid, Problem, Resolved};
use crate::value::Value;

/// The variables that all Calico programs read, `CALICO_<X>` or plain `<X>`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DatastoreVariables {
    pub datastore_type: Option<String>,
    pub endpoints: Option<String>,
    pub discovery_domain: Option<String>,
    pub username: Option<String>,
    pub password: Option<String>,
    pub key_file: Option<String>,
    pub cert_file: Option<String>,
    pub ca_file: Option<String>,
}

impl DatastoreVariables {
    /// Picks them from the environment; the spelling with `CALICO_` wins. Empty ones do not count.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name: &str| {
            let set = |name: &str| get(name).filter(|value| !value.is_empty());
            set(&format!("CALICO_{name}")).or_else(|| set(name))
        };
        Self {
            datastore_type: variable("DATASTORE_TYPE"),
            endpoints: variable("ETCD_ENDPOINTS"),
            discovery_domain: variable("ETCD_DISCOVERY_SRV"),
            username: variable("ETCD_USERNAME"),
            password: variable("ETCD_PASSWORD"),
            key_file: variable("ETCD_KEY_FILE"),
            cert_file: variable("ETCD_CERT_FILE"),
            ca_file: variable("ETCD_CA_CERT_FILE"),
        }
    }
}

/// Shows nothing: a value may hold a credential (I12).
impl fmt::Debug for DatastoreVariables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatastoreVariables").finish_non_exhaustive()
    }
}

/// How to reach etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct Connection {
    /// URLs, each ending in `/`, at least one.
    pub endpoints: Vec<String>,
    /// User name and password.
    pub credentials: Option<(String, String)>,
    /// Paths of the client's certificate and key.
    pub identity: Option<(String, String)>,
    /// Path of the authorities that servers are checked against.
    pub ca_file: Option<String>,
}

/// Shows the endpoints and what else there is, not the credentials (I12).
impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("endpoints", &self.endpoints)
            .field("credentials", &self.credentials.is_some())
            .field("identity", &self.identity)
            .field("ca_file", &self.ca_file)
            .finish()
    }
}

impl Connection {
    /// Merges parameters and variables.
    ///
    /// # Errors
    ///
    /// What an operator must mend; never with a value in the text.
    pub fn resolve(resolved: &Resolved, variables: &DatastoreVariables) -> Result<Self, Invalid> {
        let mut problems = Vec::new();
        let endpoints = endpoints(resolved, variables, &mut problems);
        let kubernetes = datastore_type(resolved, variables) == "kubernetes";
        if kubernetes && endpoints.as_ref().is_none_or(|found| !found.explicit) {
            problems.push(problem(resolved, "DatastoreType", "the kubernetes datastore is not supported, only etcdv3"));
        }
        if variables.discovery_domain.is_some() {
            let reason = match &endpoints {
                Some(found) if found.explicit => "endpoints and ETCD_DISCOVERY_SRV exclude each other",
                Some(_) | None => "ETCD_DISCOVERY_SRV is not supported; list the endpoints",
            };
            problems.push(problem(resolved, "EtcdEndpoints", reason));
        }
        let file = |name, variable: &Option<String>| match resolved.explicit(name) {
            Some(value) => Some(value.text().to_owned()).filter(|path| !path.is_empty()),
            None => variable.clone(),
        };
        let key = file("EtcdKeyFile", &variables.key_file);
        let certificate = file("EtcdCertFile", &variables.cert_file);
        if key.is_some() != certificate.is_some() {
            problems.push(problem(
                resolved,
                "EtcdKeyFile",
                "EtcdKeyFile and EtcdCertFile belong together; one is missing",
            ));
        }
        if !problems.is_empty() {
            return Err(Invalid(problems));
        }
        Ok(Self {
            endpoints: endpoints.map(|found| found.urls).unwrap_or_default(),
            credentials: variables.username.clone().zip(variables.password.clone()),
            identity: certificate.zip(key),
            ca_file: file("EtcdCaFile", &variables.ca_file),
        })
    }
}

/// Endpoints, and whether somebody named them or they are what we try by ourselves.
struct Endpoints {
    urls: Vec<String>,
    explicit: bool,
}

fn endpoints(resolved: &Resolved, variables: &DatastoreVariables, problems: &mut Vec<Problem>) -> Option<Endpoints> {
    let list = resolved.explicit("EtcdEndpoints").map(Value::list).filter(|list| !list.is_empty());
    if let Some(list) = list {
        return Some(Endpoints { urls: list.to_vec(), explicit: true });
    }
    let text = |name| resolved.get(name).map_or("", |(_, value)| value.text());
    let url = format!("{}://{}/", text("EtcdScheme"), text("EtcdAddr"));
    let complete = !text("EtcdScheme").is_empty() && !text("EtcdAddr").is_empty();
    if complete && resolved.explicit("EtcdAddr").is_some() {
        return Some(Endpoints { urls: vec![url], explicit: true });
    }
    if let Some(variable) = &variables.endpoints {
        return match crate::Kind::Endpoints.parse(variable) {
            Ok(value) => Some(Endpoints { urls: value.list().to_vec(), explicit: true }),
            Err(reason) => {
                let reason = format!("ETCD_ENDPOINTS: {reason}");
                problems.push(Problem { param: "EtcdEndpoints", source: Source::Environment, reason });
                None
            }
        };
    }
    if complete {
        return Some(Endpoints { urls: vec![url], explicit: false });
    }
    problems.push(problem(resolved, "EtcdEndpoints", "neither endpoints nor scheme and address of etcd are set"));
    None
}

fn datastore_type(resolved: &Resolved, variables: &DatastoreVariables) -> String {
    match resolved.explicit("DatastoreType") {
        Some(value) => value.text().to_owned(),
        None => variables.datastore_type.clone().unwrap_or_else(|| "etcdv3".to_owned()),
    }
}

fn problem(resolved: &Resolved, param: &'static str, reason: &str) -> Problem {
    let source = resolved.get(param).map_or(Source::Default, |(source, _)| source);
    Problem { param, source, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Raw;

    /// Parameters of the file, variables, and the endpoints or what the refusal says.
    #[allow(clippy::type_complexity, reason = "rows of a table")]
    const CASES: &[(&[(&str, &str)], &[(&str, &str)], Result<&[&str], &str>)] = &[
        (&[], &[], Ok(&["http://127.0.0.1:2379/"])),
        (&[], &[("ETCD_ENDPOINTS", "https://a:1, https://b:1")], Ok(&["https://a:1/", "https://b:1/"])),
        (&[], &[("CALICO_ETCD_ENDPOINTS", "http://c:1"), ("ETCD_ENDPOINTS", "http://a:1")], Ok(&["http://c:1/"])),
        (&[("EtcdAddr", "h:1")], &[("ETCD_ENDPOINTS", "http://a:1")], Ok(&["http://h:1/"])),
        (&[("EtcdAddr", "h:1"), ("EtcdScheme", "HTTPS")], &[], Ok(&["https://h:1/"])),
        (&[("etcdendpoints", "http://e:1"), ("etcdaddr", "h:1")], &[], Ok(&["http://e:1/"])),
        (&[("EtcdEndpoints", "none")], &[("ETCD_ENDPOINTS", "http://a:1")], Ok(&["http://a:1/"])),
        (&[("EtcdAddr", "none")], &[], Err("neither endpoints nor scheme")),
        (&[("DatastoreType", "kubernetes")], &[], Err("not supported, only etcdv3")),
        (&[], &[("DATASTORE_TYPE", "kubernetes")], Err("not supported, only etcdv3")),
        (&[("DatastoreType", "etcdv3")], &[("DATASTORE_TYPE", "kubernetes")], Ok(&["http://127.0.0.1:2379/"])),
        (&[("EtcdAddr", "h:1")], &[("DATASTORE_TYPE", "kubernetes")], Ok(&["http://h:1/"])),
        (&[], &[("ETCD_ENDPOINTS", "http://a:1,https://b:1")], Err("not all of the same scheme")),
        (&[], &[("ETCD_DISCOVERY_SRV", "example.org")], Err("list the endpoints")),
        (&[("EtcdAddr", "h:1")], &[("ETCD_DISCOVERY_SRV", "example.org")], Err("exclude each other")),
        (&[("EtcdKeyFile", "/k")], &[], Err("belong together")),
    ];

    #[test]
    fn endpoints_come_from_the_strongest_source_that_names_any() {
        for (params, variables, expected) in CASES {
            match (connection(params, variables), expected) {
                (Ok(connection), Ok(expected)) => {
                    assert_eq!(connection.endpoints, *expected, "{params:?} {variables:?}")
                }
                (Err(invalid), Err(part)) => {
                    assert!(invalid.to_string().contains(part), "{params:?} {variables:?}: {invalid}");
                }
                (got, expected) => panic!("{params:?} {variables:?}: got {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn files_of_parameters_replace_those_of_variables() {
        let variables =
            [("ETCD_KEY_FILE", "/vk"), ("ETCD_CERT_FILE", "/vc"), ("ETCD_CA_CERT_FILE", "/va"), ("ETCD_USERNAME", "u")];
        let one = connection(&[], &variables).unwrap();
        assert_eq!(one.identity, Some(("/vc".to_owned(), "/vk".to_owned())));
        assert_eq!(one.ca_file.as_deref(), Some("/va"));
        assert_eq!(one.credentials, None, "a user name without password does not count");
        let two = connection(&[("EtcdKeyFile", "/k"), ("EtcdCaFile", "none")], &variables).unwrap();
        assert_eq!(two.identity, Some(("/vc".to_owned(), "/k".to_owned())));
        assert_eq!(two.ca_file, None);
    }

    #[test]
    fn nothing_that_is_printed_holds_a_credential() {
        let variables = [("ETCD_USERNAME", "root"), ("ETCD_PASSWORD", "hunter2")];
        let good = connection(&[], &variables).unwrap();
        assert_eq!(good.credentials, Some(("root".to_owned(), "hunter2".to_owned())));
        let bad = connection(&[], &[("ETCD_ENDPOINTS", "http://root:hunter2@a:1")]).unwrap_err();
        let text = format!("{good:?} {bad:?} {bad} {:?}", read(&variables));
        assert!(!text.contains("hunter2"), "{text}");
    }

    fn connection(params: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Connection, Invalid> {
        let mut raw = Raw::default();
        raw.set(Source::Default, "FelixHostname", "h1");
        for (name, value) in params {
            raw.set(Source::File, name, value);
        }
        Connection::resolve(&raw.resolve().unwrap(), &read(variables))
    }

    fn read(variables: &[(&str, &str)]) -> DatastoreVariables {
        DatastoreVariables::read(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }
}
