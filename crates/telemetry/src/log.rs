//! The log on standard output (operations.md 7).
//!
//! One record per line, as text for people or as JSON for machines. Records of libraries that use
//! the `log` crate are bridged, and those of the network libraries are held back below `warn`:
//! otherwise our own level would bring every HTTP/2 frame and netlink message.

use std::io::{self, IsTerminal as _};

use tracing::level_filters::LevelFilter;
use tracing::{Subscriber, subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Registry, fmt, reload};

/// Libraries whose records below `warn` nobody wants.
const NOISY: &[&str] = &[
    "h2",
    "hyper",
    "hyper_util",
    "netlink_packet_core",
    "netlink_packet_route",
    "netlink_proto",
    "netlink_sys",
    "rtnetlink",
    "rustls",
    "tonic",
    "tower",
];

/// Least level that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    Trace,
    Debug,
    #[default]
    Info,
    Warn,
    Error,
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    /// One object per line with `timestamp`, `level`, `message`, `target` and the record's fields.
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub level: Level,
    pub format: Format,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[error("the log is already set up")]
pub struct LogError;

/// The log of the process; its level can be changed.
#[derive(Clone, Debug)]
pub struct Log {
    filter: reload::Handle<Targets, Registry>,
}

/// Sets up the log of the process, once.
///
/// # Errors
///
/// If it was set up before.
pub fn start(options: Options) -> Result<Log, LogError> {
    // The bridge keeps the level of this moment, so it starts with all that it may ever pass on.
    let (filter, handle) = reload::Layer::new(targets(Level::Trace));
    let ansi = io::stdout().is_terminal();
    let subscriber = Registry::default().with(output(options.format, ansi, io::stdout).with_filter(filter));
    tracing_log::LogTracer::init().map_err(|_| LogError)?;
    subscriber::set_global_default(subscriber).map_err(|_| LogError)?;
    let log = Log { filter: handle };
    log.set_level(options.level);
    Ok(log)
}

impl Log {
    /// Changes the least level that is written.
    pub fn set_level(&self, level: Level) {
        // Fails only once the subscriber is gone, and then there is nothing to filter.
        self.filter.reload(targets(level)).ok();
    }
}

fn targets(level: Level) -> Targets {
    let ours = match level {
        Level::Trace => LevelFilter::TRACE,
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warn => LevelFilter::WARN,
        Level::Error => LevelFilter::ERROR,
        Level::Off => LevelFilter::OFF,
    };
    let theirs = ours.min(LevelFilter::WARN);
    Targets::new().with_default(ours).with_targets(NOISY.iter().map(|target| (*target, theirs)))
}

fn output<S, W>(format: Format, ansi: bool, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    match format {
        Format::Text => fmt::layer().with_ansi(ansi).with_writer(writer).boxed(),
        Format::Json => fmt::layer().json().flatten_event(true).with_writer(writer).boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_json_record_is_one_object_with_the_fields_at_the_top() {
        let text = written(Format::Json, false, Level::Info, || {
            tracing::info!(seq = 7, error = "a \"quoted\"\nreason", "batch applied");
        });
        let (record, rest) = text.split_once('\n').unwrap();
        assert_eq!(rest, "");
        for part in [
            r#""level":"INFO""#,
            r#""message":"batch applied""#,
            r#""seq":7"#,
            r#""error":"a \"quoted\"\nreason""#,
            r#""timestamp":"2"#,
            r#""target":"telemetry::log::tests""#,
        ] {
            assert!(record.contains(part), "{part} is not in {record}");
        }
    }

    #[test]
    fn a_text_record_is_one_line_without_escape_codes_unless_a_terminal_asks_for_them() {
        let record = || tracing::warn!(key = "np/a", "policy is invalid");
        let text = written(Format::Text, false, Level::Info, record);
        assert!(text.contains("WARN") && text.contains("policy is invalid key=\"np/a\""), "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
        assert!(written(Format::Text, true, Level::Info, record).contains('\x1b'));
    }

    #[test]
    fn levels_hold_and_network_libraries_never_say_more_than_warnings() {
        let records = || {
            tracing::trace!("ours-trace");
            tracing::debug!("ours-debug");
            tracing::info!("ours-info");
            tracing::error!("ours-error");
            tracing::info!(target: "h2::codec", "theirs-info");
            tracing::warn!(target: "netlink_proto", "theirs-warn");
        };
        let cases: &[(Level, &[&str])] = &[
            (Level::Trace, &["ours-trace", "ours-debug", "ours-info", "ours-error", "theirs-warn"]),
            (Level::Debug, &["ours-debug", "ours-info", "ours-error", "theirs-warn"]),
            (Level::Info, &["ours-info", "ours-error", "theirs-warn"]),
            (Level::Warn, &["ours-error", "theirs-warn"]),
            (Level::Error, &["ours-error"]),
            (Level::Off, &[]),
        ];
        for (level, expected) in cases {
            let text = written(Format::Text, false, *level, records);
            let found: Vec<_> = text.lines().filter_map(|line| line.split(": ").last()).map(str::trim).collect();
            assert_eq!(&found, expected, "{level:?}");
        }
    }

    fn written(format: Format, ansi: bool, level: Level, records: impl FnOnce()) -> String {
        let sink = Sink::default();
        let subscriber = Registry::default().with(output(format, ansi, sink.clone()).with_filter(targets(level)));
        subscriber::with_default(subscriber, records);
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Sink {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }
}
