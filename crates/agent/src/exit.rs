//! Why the process ends, and with which code (operations.md 4.1).

use std::time::Duration;

use settings::Difference;
use tracing::{error, info};

/// Ends that the agent decides on itself are delayed, against restarts in a tight loop.
const PAUSE: Duration = Duration::from_secs(2);

/// Why the process ends.
#[derive(Debug)]
pub(crate) enum Ended {
    /// SIGTERM or SIGINT.
    Signal(&'static str),
    /// SIGHUP asks for a start from the beginning.
    Hangup,
    /// Settings that only take effect at a start changed in the datastore.
    SettingsChanged(Vec<Difference>),
    /// `datastoreReady` is no longer true.
    DatastoreUnready,
    PartFailed(&'static str, anyhow::Error),
    /// An internal error, already logged with its place.
    Panicked(&'static str),
}

impl Ended {
    /// How long to wait before the exit.
    pub(crate) const fn pause(&self) -> Option<Duration> {
        match self {
            Self::Signal(_) => None,
            Self::Hangup
            | Self::SettingsChanged(_)
            | Self::DatastoreUnready
            | Self::PartFailed(..)
            | Self::Panicked(_) => Some(PAUSE),
        }
    }

    /// Logs why, once.
    pub(crate) fn log(&self) {
        match self {
            Self::Signal(signal) => info!(signal, "stopping; everything in the kernel stays as it is"),
            Self::Hangup => info!(signal = "SIGHUP", "restarting"),
            Self::SettingsChanged(differences) => {
                for Difference { param, old, new } in differences {
                    info!(param, old, new, "configuration changed");
                }
                info!(parameters = differences.len(), "restarting because the configuration changed");
            }
            Self::DatastoreUnready => error!("stopping because the datastore became unready"),
            Self::PartFailed(part, cause) => {
                error!(part, error = %format_args!("{cause:#}"), "stopping because a part failed")
            }
            Self::Panicked(part) => error!(part, "stopping because of an internal error"),
        }
    }

    /// The code that the service manager sees; the unit file restarts on all but 0.
    pub(crate) const fn code(&self) -> u8 {
        match self {
            Self::Signal(_) => 0,
            Self::DatastoreUnready | Self::PartFailed(..) => 1,
            Self::Panicked(_) => 2,
            Self::Hangup | Self::SettingsChanged(_) => 129,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_the_code_that_supervisors_know() {
        let failed = || anyhow::anyhow!("x");
        let cases = [
            (Ended::Signal("SIGTERM"), 0, false),
            (Ended::PartFailed("links", failed()), 1, true),
            (Ended::DatastoreUnready, 1, true),
            (Ended::Panicked("graph"), 2, true),
            (Ended::Hangup, 129, true),
            (Ended::SettingsChanged(Vec::new()), 129, true),
        ];
        for (ended, code, pauses) in cases {
            assert_eq!((ended.code(), ended.pause().is_some()), (code, pauses), "{ended:?}");
        }
    }
}
