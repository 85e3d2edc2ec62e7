//! The vocabulary of chains, rules, sets and routes.
//!
//! The narrow waist of the program: `compiler` speaks it without knowing that iptables exists,
//! `dataplane` understands it without knowing what a policy is. No text of any tool appears here.

pub mod chain;
pub mod changes;
pub mod iface;
pub mod members;
pub mod origin;
pub mod route;
pub mod rule;
pub mod set;

pub use chain::{BaseChain, Chain, ChainName, Hooks, Table, TableId};
pub use changes::{Changes, SetChange, TableChanges};
pub use iface::InterfaceSpec;
pub use members::Members;
pub use model::{Family, LinkState};
pub use origin::{Direction, Origin};
pub use route::RouteSpec;
pub use rule::{Action, ConnState, IcmpType, InterfaceMatch, Match, PortRange, Protocol, Rate, RateUnit, Rule, Side};
pub use set::{Member, SetKind, SetName, SetSpec};
