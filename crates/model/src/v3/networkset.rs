//! NetworkSet and GlobalNetworkSet (datastore.md 3.9).

use super::object::objects;
use super::text::Text;

objects! {
    /// `spec` of both kinds of network set.
    pub struct NetworkSetSpec<'a> {
        "nets" nets: Vec<Text<'a>>,
    }
}
