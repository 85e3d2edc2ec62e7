//! Profiles: rules that apply where no policy decided.

use crate::policy::{Action, Rule};

/// Name of the profile that exists without being stored (datastore.md K-6).
pub const DEFAULT_ALLOW: &str = "projectcalico-default-allow";

/// Rules of one profile. Its labels travel separately (datastore.md C-34).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProfileRules {
    pub inbound: Vec<Rule>,
    pub outbound: Vec<Rule>,
}

impl ProfileRules {
    /// Returns the rules of a profile that has one verdict for everything, in both directions.
    pub fn for_everything(action: Action) -> Self {
        Self { inbound: vec![Rule::for_everything(action)], outbound: vec![Rule::for_everything(action)] }
    }
}
