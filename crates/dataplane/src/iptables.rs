//! The packet filter, through iptables' save and restore programs.

mod account;
pub mod backend;
pub mod evidence;
pub mod family;
pub mod features;
mod fight;
pub mod hash;
mod hits;
mod hold;
mod leftovers;
mod listing;
pub mod lock;
pub mod native;
pub(crate) mod nfwire;
pub mod parse;
pub mod plan;
pub mod refusal;
pub mod render;
pub mod sticky;
pub mod table;
pub mod tools;
mod users;
pub mod variant;
mod watch;

use program::BaseChain;

pub use backend::{Backend, FamilyTools, Installed, TableTransport, Tools};
pub use family::FamilyTables;
pub use features::{Features, Overrides};
pub use hold::BlockedSets;
pub use table::{Checks, ForeignChange, TableDriver, TableRequest, TableResponse, TableStats};
pub use tools::TableTools;

/// Returns the base chain of this name.
fn base_chain(name: &str) -> Option<BaseChain> {
    let all = [BaseChain::Prerouting, BaseChain::Input, BaseChain::Forward, BaseChain::Output, BaseChain::Postrouting];
    all.into_iter().find(|base| base.as_str() == name)
}
