//! Which workload endpoints are on this host (policy.md A-8).
//!
//! Input: workload endpoints, all hosts.
//! Output: [`LocalDelta`], consumed by `selectors` (policies), `profiles` and `endpoints`.
//!
//! Law: *local = { endpoint | host of its key = this host, byte for byte }*.
//! A delta's `old` is the `new` of the one before it for the same key, and the two differ.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{Name, WorkloadEndpoint, WorkloadEndpointKey};

/// A local endpoint came, changed or went.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LocalDelta {
    pub(crate) key: WorkloadEndpointKey,
    pub(crate) old: Option<Arc<WorkloadEndpoint>>,
    pub(crate) new: Option<Arc<WorkloadEndpoint>>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct LocalEndpoints {
    host: Name,
    values: BTreeMap<WorkloadEndpointKey, Arc<WorkloadEndpoint>>,
}

impl LocalEndpoints {
    pub(crate) fn new(host: Name) -> Self {
        Self { host, values: BTreeMap::new() }
    }

    pub(crate) fn on_endpoint(
        &mut self,
        key: &WorkloadEndpointKey,
        new: Option<&Arc<WorkloadEndpoint>>,
        out: &mut Vec<LocalDelta>,
    ) {
        if key.host != self.host {
            return;
        }
        let old = match new {
            Some(new) => self.values.insert(key.clone(), Arc::clone(new)),
            None => self.values.remove(key),
        };
        if old.as_ref() != new {
            out.push(LocalDelta { key: key.clone(), old, new: new.cloned() });
        }
    }

    pub(crate) fn values(&self) -> impl ExactSizeIterator<Item = &Arc<WorkloadEndpoint>> {
        self.values.values()
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 1] {
        [("local", self.values.len())]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_other_hosts_and_equal_values_are_silent() {
        let mut stage = LocalEndpoints::new("h1".into());
        let value = |mac: u8| Some(Arc::new(WorkloadEndpoint { mac: Some([mac; 6]), ..WorkloadEndpoint::default() }));
        let steps = [
            ("h1", value(1), "-> 1"),
            ("h1", value(1), ""),
            ("H1", value(1), ""),
            ("h2", value(1), ""),
            ("h1", value(2), "1 -> 2"),
            ("h2", None, ""),
            ("h1", None, "2 ->"),
            ("h1", None, ""),
        ];
        for (step, (host, value, expected)) in steps.into_iter().enumerate() {
            let key = WorkloadEndpointKey {
                host: host.into(),
                orchestrator: "openstack".into(),
                workload: "openstack/vm1".into(),
                endpoint: "eth0".into(),
            };
            let mut out = Vec::new();
            stage.on_endpoint(&key, value.as_ref(), &mut out);
            let mac = |value: &Option<Arc<WorkloadEndpoint>>| {
                value.as_ref().and_then(|value| value.mac).map(|mac| mac[0].to_string()).unwrap_or_default()
            };
            let got: Vec<String> =
                out.iter().map(|delta| format!("{} -> {}", mac(&delta.old), mac(&delta.new))).collect();
            assert_eq!(got.join("; ").trim(), expected, "step {step}");
        }
        assert!(stage.is_empty());
    }
}
