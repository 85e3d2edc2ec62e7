//! How the process tells what it does: the format and the levels of the log.

pub mod log;

pub use log::{Format, Level, Log, LogError, Options};
