//! Why a driver could not do its work.

use std::io;
use std::time::Duration;

/// One variant per thing the *caller* may do differently.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    #[error("`{program}` could not be started")]
    Spawn {
        program: String,
        #[source]
        source: io::Error,
    },

    #[error("contact with `{program}` was lost")]
    Lost {
        program: String,
        #[source]
        source: io::Error,
    },

    #[error("`{program}` exited with status {status}{}: {stderr}", at_line(*line))]
    Rejected { program: String, status: i32, line: Option<u32>, stderr: String },

    #[error("rule refused: table {table} chain {chain}, {rule}: {message}")]
    RuleRefused { table: String, chain: String, rule: String, message: String },

    #[error("`{program}` found the xtables lock held by another process")]
    LockBusy { program: String },

    #[error("`{program}` found no set {set}")]
    SetMissing { program: String, set: String },

    #[error("none of {candidates} is installed")]
    NoProgram { candidates: String },

    #[error("`{program}` did not finish within {after:?}")]
    Timeout { program: String, after: Duration },

    #[error("cannot parse line {line} of `{program}` output: {reason}")]
    Readback { program: String, line: u32, reason: String },

    #[error("table {table} cannot be listed, so nothing is written to it")]
    Unlisted {
        table: String,
        #[source]
        source: Box<DriverError>,
    },

    #[error("netlink request `{request}` failed")]
    Netlink {
        request: String,
        #[source]
        source: io::Error,
    },

    #[error("cannot write {path}")]
    Sysctl {
        path: String,
        #[source]
        source: io::Error,
    },
}

fn at_line(line: Option<u32>) -> String {
    line.map(|line| format!(" at line {line}")).unwrap_or_default()
}

impl DriverError {
    /// The message with its causes, as one line for reports.
    pub fn full_text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
