//! Tests of the conversion: by resource, against the vectors, with hostile input.

mod hazards;
mod neutron;
mod policies;
mod properties;
mod resources;
mod rules;
mod validation;

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::endpoint::WorkloadEndpoint;
use crate::policy::{EntityMatch, Policy, Rule};

const ENDPOINT_KEY: &str = "workloadendpoints/ns/host--1-k8s-pod-eth0";

/// Spoofing is not allowed.
const STRICT: Options = Options { allow_spoofing: false };

fn converted(key: &str, document: &Value) -> Converted {
    let key = format!("{}{key}", crate::key::RESOURCES);
    let key = ResourceKey::parse(key.as_bytes()).unwrap_or_else(|| panic!("{key} is not read"));
    convert(&key, Some(document.to_string().as_bytes()), &STRICT)
}

/// Converts a policy in namespace `ns`.
fn namespaced(spec: &Value) -> (Option<Arc<Policy>>, Vec<Complaint>) {
    let document = json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": spec});
    policy(converted("networkpolicies/ns/p", &document))
}

fn global(spec: &Value) -> (Option<Arc<Policy>>, Vec<Complaint>) {
    policy(converted("globalnetworkpolicies/p", &json!({"metadata": {"name": "p"}, "spec": spec})))
}

fn policy(converted: Converted) -> (Option<Arc<Policy>>, Vec<Complaint>) {
    let Converted { updates, complaints } = converted;
    let [Update::Policy(_, policy)] = updates.as_slice() else { panic!("{updates:?}") };
    (policy.clone(), complaints)
}

/// The only rule of a global policy with this one ingress rule, and field and effect of each complaint.
fn rule(rule: &Value) -> (Option<Rule>, Vec<(String, Effect)>) {
    let (policy, complaints) = global(&json!({"ingress": [rule]}));
    let complaints = complaints.into_iter().map(|complaint| (complaint.field, complaint.effect)).collect();
    (policy.and_then(|policy| policy.inbound.first().cloned()), complaints)
}

fn endpoint(spec: &Value, options: Options) -> (Option<Arc<WorkloadEndpoint>>, Vec<Complaint>) {
    let key = ResourceKey::parse(format!("{}{ENDPOINT_KEY}", crate::key::RESOURCES).as_bytes()).unwrap();
    let Converted { updates, complaints } = convert(&key, Some(json!({"spec": spec}).to_string().as_bytes()), &options);
    let [Update::WorkloadEndpoint(_, endpoint)] = updates.as_slice() else { panic!("{updates:?}") };
    (endpoint.clone(), complaints)
}

fn fields(complaints: &[Complaint]) -> Vec<&str> {
    complaints.iter().map(|complaint| complaint.field.as_str()).collect()
}

fn vectors(file: &str) -> Value {
    let path = format!("{}/../../tests/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}
