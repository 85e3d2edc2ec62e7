//! Configuration parameters and how layers of them resolve (operations.md 2, 3).
//!
//! [`file`] and [`environment`] turn text into names and raw values, [`Raw`] holds them by source,
//! [`Raw::resolve`] looks each name up in the table of [`params`], parses the value as its
//! [`kind`] says and merges the sources into [`Settings`].
//!
//! Invariant: this crate does no I/O. The agent reads the file and the environment, and checks that
//! the files which parameters name exist. No message of this crate contains a value that may hold a
//! credential (I12).

pub mod connection;
pub mod environment;
pub mod example;
pub mod file;
pub mod kind;
pub mod params;
pub mod raw;
pub mod resolve;
mod settings;
pub mod value;

pub use connection::{Connection, DatastoreVariables};
pub use kind::Kind;
pub use params::{Group, Param, Support};
pub use raw::{Raw, Source};
pub use resolve::{Difference, Invalid, Note, Problem, Resolved};
pub use settings::{AllowAction, Backend, DenyAction, EndpointToHost, InsertMode, LogFormat, Settings, Severity};
pub use value::{LogRate, PortProtocol, ProtocolPort, RateUnit, Value};
