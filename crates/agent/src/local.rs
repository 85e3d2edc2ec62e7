//! What is known before anything is connected: command line, file, environment, host.
//!
//! Feeds [`crate::bootstrap`]. Everything here is checked completely before a socket, thread or
//! child exists.

use std::io;
use std::path::Path;

use anyhow::Context as _;
use settings::{Connection, DatastoreVariables, Raw, Resolved, Severity, Source, environment, file};

use crate::arguments::Arguments;

/// Exists if the kernel has IPv6.
const IPV6_SETTINGS: &str = "/proc/sys/net/ipv6";

/// The variable, without its prefix, for what is logged before the configuration is complete; it is no
/// parameter (operations.md 4.2).
const EARLY_SEVERITY: &str = "earlylogseverityscreen";

/// The configuration of this host, before the datastore has its say.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) raw: Raw,
    pub(crate) resolved: Resolved,
    pub(crate) connection: Connection,
    pub(crate) warnings: Vec<Warning>,
    /// Severity of the log until the datastore has had its say.
    pub(crate) early_severity: Severity,
}

/// Something odd about how the configuration is written.
#[derive(Debug)]
pub(crate) struct Warning {
    pub(crate) message: &'static str,
    /// The name of a parameter.
    pub(crate) param: String,
}

/// Reads and resolves it.
///
/// # Errors
///
/// What the operator must mend; no text holds a credential.
pub(crate) fn read(arguments: &Arguments) -> anyhow::Result<Local> {
    let mut raw = Raw::default();
    let mut warnings = Vec::new();
    raw.set(Source::Default, "FelixHostname", &hostname());

    let contents = read_file(&arguments.config_file)?;
    for (name, value) in &contents.pairs {
        raw.set(Source::File, name, value);
    }
    for param in contents.repeated {
        warnings.push(Warning { message: "parameter is set twice in the config file, the last one counts", param });
    }

    let variables = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    let environment = environment::read(variables);
    let mut early_severity = None;
    for (name, value) in &environment.pairs {
        if name == EARLY_SEVERITY {
            early_severity = Severity::parse(value);
        } else {
            raw.set(Source::Environment, name, value);
        }
    }
    for param in environment.repeated {
        warnings.push(Warning { message: "parameter is set twice in the environment, the last one counts", param });
    }

    if let Some(format) = arguments.log_format {
        raw.set(Source::Internal, "LogFormatScreen", format.word());
    }
    if !Path::new(IPV6_SETTINGS).exists() {
        raw.set(Source::Internal, "Ipv6Support", "false");
        let message = "the kernel has no IPv6, which is therefore off";
        warnings.push(Warning { message, param: "Ipv6Support".to_owned() });
    }

    let resolved = raw.resolve().context("wrong configuration")?;
    let variables = DatastoreVariables::read(|name| std::env::var(name).ok());
    let connection = Connection::resolve(&resolved, &variables).context("wrong configuration")?;
    let early_severity = early_severity.unwrap_or(resolved.settings.log_severity);
    Ok(Local { raw, resolved, connection, warnings, early_severity })
}

/// Reads the file; that there is none is fine (operations.md 2.4).
fn read_file(path: &Path) -> anyhow::Result<file::Contents> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(file::Contents::default()),
        Err(error) => return Err(error).with_context(|| format!("reading config file {}", path.display())),
    };
    file::parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("config file {}", path.display()))
}

/// The name of the host in lower case; empty if it has none (operations.md 3.1).
fn hostname() -> String {
    let name = nix::unistd::gethostname().ok().map(|name| name.to_string_lossy().into_owned());
    let name = name.map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty());
    name.or_else(|| std::env::var("HOSTNAME").ok().map(|name| name.trim().to_lowercase())).unwrap_or_default()
}
