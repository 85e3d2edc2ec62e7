//! Watches the configuration that is stored in the datastore (operations.md 2.7, 2.8).
//!
//! Fed by the main loop with updates about configuration; tells it when the process must end
//! because what it runs with is no longer what is wanted.
//!
//! Invariant: a configuration that cannot be resolved changes nothing; the agent keeps running with
//! what it has.

use std::collections::BTreeMap;
use std::sync::Arc;

use datastore::RawConfig;
use model::Update;
use model::update::ConfigSource;
use settings::{Raw, Resolved, Source};
use tracing::{debug, error};

use crate::exit::Ended;

/// Adds what the datastore says to the local configuration.
pub(crate) fn with_datastore(local: &Raw, stored: &RawConfig) -> Raw {
    let mut raw = local.clone();
    for (name, value) in stored.cluster_information.iter().chain(&stored.default) {
        raw.set(Source::DatastoreGlobal, name, value);
    }
    for (name, value) in &stored.node {
        raw.set(Source::DatastoreHost, name, value);
    }
    raw
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct ConfigWatch {
    local: Raw,
    /// What the process runs with.
    running: Resolved,
    /// Name of the FelixConfiguration of this host.
    node: String,
    stored: RawConfig,
    ready: Option<bool>,
    changed: bool,
}

impl ConfigWatch {
    pub(crate) fn new(local: Raw, running: Resolved) -> Self {
        let node = format!("node.{}", running.settings.hostname);
        Self { local, running, node, stored: RawConfig::default(), ready: None, changed: true }
    }

    /// The name of this host in the datastore.
    pub(crate) fn hostname(&self) -> &str {
        &self.running.settings.hostname
    }

    /// Takes in what is about configuration and hands on what is for the graph.
    pub(crate) fn take(&mut self, update: Update) -> Option<Update> {
        match update {
            Update::Ready(ready) => {
                self.changed |= self.ready != ready;
                self.ready = ready;
                None
            }
            Update::Config(source, values) => {
                self.store(&source, values);
                None
            }
            Update::WorkloadEndpoint(..)
            | Update::Policy(..)
            | Update::Tier(..)
            | Update::ProfileRules(..)
            | Update::ProfileLabels(..)
            | Update::NetworkSet(..)
            | Update::HostEndpoint(..)
            | Update::Link(..) => Some(update),
        }
    }

    fn store(&mut self, source: &ConfigSource, values: Option<Arc<BTreeMap<String, String>>>) {
        let place = match source {
            ConfigSource::ClusterInformation => &mut self.stored.cluster_information,
            ConfigSource::FelixConfiguration(name) if **name == *"default" => &mut self.stored.default,
            ConfigSource::FelixConfiguration(name) if **name == *self.node => &mut self.stored.node,
            ConfigSource::FelixConfiguration(_) => return,
        };
        let values = values.map(|values| (*values).clone()).unwrap_or_default();
        self.changed |= *place != values;
        *place = values;
    }

    /// Compares with what the process runs with; to be called once the datastore is in sync, and
    /// again after every update.
    pub(crate) fn check(&mut self) -> Option<Ended> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        if self.ready != Some(true) {
            return Some(Ended::DatastoreUnready);
        }
        match with_datastore(&self.local, &self.stored).resolve() {
            Ok(wanted) => {
                let differences = self.running.restart_differences(&wanted);
                if !differences.is_empty() {
                    return Some(Ended::SettingsChanged(differences));
                }
                debug!("stored configuration changed without effect");
            }
            Err(invalid) => {
                error!(error = %invalid, "stored configuration is wrong; keeping the one that is in use");
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_with_an_effect_end_the_process() {
        let felix = |name: &str| ConfigSource::FelixConfiguration(name.into());
        #[allow(clippy::type_complexity, reason = "rows of a table")]
        let cases: &[(&str, &[(ConfigSource, &[(&str, &str)])], Option<u8>)] = &[
            ("nothing stored", &[], None),
            ("the default written out", &[(felix("default"), &[("InterfacePrefix", "cali")])], None),
            ("an effective parameter", &[(felix("default"), &[("InterfacePrefix", "tap")])], Some(129)),
            ("the host's own", &[(felix("node.h1"), &[("MaxIpsetSize", "5")])], Some(129)),
            ("another host's", &[(felix("node.h2"), &[("MaxIpsetSize", "5")])], None),
            ("not effective yet", &[(felix("default"), &[("HealthPort", "5")])], None),
            (
                "live facts",
                &[(
                    ConfigSource::ClusterInformation,
                    &[("ClusterGUID", "g"), ("ClusterType", "k8s"), ("CalicoVersion", "v")],
                )],
                None,
            ),
            ("openstack", &[(ConfigSource::ClusterInformation, &[("ClusterType", "openstack")])], Some(129)),
            ("wrong", &[(felix("default"), &[("ChainInsertMode", "sideways")])], None),
            ("masked by the file", &[(felix("default"), &[("LogPrefix", "other")])], None),
        ];
        for (case, updates, expected) in cases {
            let mut watch = watch();
            assert!(watch.take(Update::Ready(Some(true))).is_none());
            for (source, values) in *updates {
                let values = values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
                assert!(watch.take(Update::Config(source.clone(), Some(Arc::new(values)))).is_none());
            }
            assert_eq!(watch.check().map(|ended| ended.code()), *expected, "{case}");
            assert!(watch.check().is_none(), "{case}: said once");
        }
    }

    #[test]
    fn anything_but_ready_ends_the_process_with_1() {
        for ready in [None, Some(false)] {
            let mut watch = watch();
            watch.take(Update::Ready(Some(true)));
            assert!(watch.check().is_none());
            watch.take(Update::Ready(ready));
            assert_eq!(watch.check().map(|ended| ended.code()), Some(1), "{ready:?}");
        }
        // Never heard of it.
        assert_eq!(watch().check().map(|ended| ended.code()), Some(1));
    }

    #[test]
    fn facts_are_handed_on() {
        let update = Update::Tier("default".into(), None);
        assert_eq!(watch().take(update.clone()), Some(update));
    }

    fn watch() -> ConfigWatch {
        let mut local = Raw::default();
        local.set(Source::Default, "FelixHostname", "h1");
        local.set(Source::File, "LogPrefix", "mine");
        let running = local.resolve().unwrap();
        ConfigWatch::new(local, running)
    }
}
