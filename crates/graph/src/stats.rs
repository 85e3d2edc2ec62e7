//! Plain numbers about the graph, for metrics and benchmarks.

pub use crate::selectors::SelectorStats;

/// Sizes now and work done so far; the metrics of policy.md A-10 are read from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Local workload and host endpoints (`felix_active_local_endpoints`).
    pub local_endpoints: u64,
    /// Those of them that list a profile which is not stored: it denies (policy.md ).
    pub endpoints_missing_a_profile: u64,
    /// Active policies (`felix_active_local_policies`).
    pub active_policies: u64,
    /// Profiles that local endpoints list.
    pub active_profiles: u64,
    /// Needed sets of all kinds (`felix_active_local_selectors`).
    pub active_sets: u64,
    /// Endpoints and network sets, all hosts (`felix_label_index_num_endpoints`).
    pub objects: u64,
    /// Policy selectors against local endpoints.
    pub policy_selectors: SelectorStats,
    /// Selectors of active rules against everything (`felix_label_index_*`).
    pub rule_selectors: SelectorStats,
    /// How much went over which arrow.
    pub flow: Flow,
}

/// Deltas by stage; the quotient of one line and the line above is the amplification of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    pub updates: u64,
    pub local: u64,
    pub local_matches: u64,
    pub active: u64,
    pub profiles: u64,
    pub references: u64,
    pub rule_matches: u64,
    pub members: u64,
    /// Entries of batches (`felix_calc_graph_output_events`).
    pub output: u64,
}
