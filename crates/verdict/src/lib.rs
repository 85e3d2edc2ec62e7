//! What policy says about a packet, and why, read straight from the stored objects.
//!
//! Written from policy.md sections 2 to 6, with nested loops and without any of the machinery that turns
//! objects into programs: it is what the programs are compared with, and what can tell an operator why a
//! packet was denied.
//!
//! ```
//! use verdict::{Facts, Judge, Packet, Settings, Trace};
//!
//! let (facts, settings) = (Facts::new(), Settings::default());
//! let packet = Packet::new([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), 6).with_ports(40000, 80);
//! let judge = Judge::new(&facts, &settings).trace(Trace::On);
//! assert_eq!(
//!     judge.judge_forwarded("host", "cali1", "eth0", &packet).to_string(),
//!     "tcp from 10.0.0.1 port 40000 to 10.0.0.2 port 80: deny\n\
//!      normal egress: deny, because no endpoint has interface cali1"
//! );
//! ```
//!
//! Not judged: rate and connection limits, the reverse path check, and what the host's own rules say.
//!
//! Invariant: the same facts give the same verdict, with the same words.

mod endpoint;
mod facts;
mod judge;
mod lists;
mod packet;
mod reason;
mod rule;

pub use endpoint::{EndpointKey, Failsafe, List, Settings, Subject, Tunnel};
pub use facts::{Facts, ObjectKey};
pub use judge::{Judge, Trace};
pub use packet::{Connection, Direction, Packet, Side};
pub use reason::{Contribution, Forwarded, Mismatch, Outcome, Reason, RuleOwner, RulePlace, Step, Verdict};
