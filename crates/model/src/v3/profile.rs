//! Profile (datastore.md 3.10).

use super::object::objects;
use super::policy::Rule;
use super::text::TextMap;

objects! {
    /// `spec` of a profile.
    pub struct ProfileSpec<'a> {
        "ingress" ingress: Vec<Rule<'a>>,
        "egress" egress: Vec<Rule<'a>>,
        "labelsToApply" labels_to_apply: TextMap<'a>,
    }
}
