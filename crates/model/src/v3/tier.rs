//! Tier (datastore.md 3.8).

use super::object::objects;
use super::text::Text;

objects! {
    /// `spec` of a tier.
    pub struct TierSpec<'a> {
        "order" order: Option<f64>,
        "defaultAction" default_action: Text<'a>,
    }
}
