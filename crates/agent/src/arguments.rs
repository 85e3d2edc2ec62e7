//! The command line (operations.md 4.1).

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, ValueEnum};

const EXIT_CODES: &str = "\
Exit codes:
  0    stopped by SIGTERM or SIGINT
  1    usage error, wrong configuration, or a part failed; also when the datastore becomes unready
  2    internal error
  129  wants to be started again: the configuration changed, or SIGHUP

Whatever is in the kernel stays there when the agent ends.";

/// Calico's per-host agent: enforces policy from etcd with iptables, IP sets and routes.
#[derive(Debug, Parser)]
#[command(name = "calico-felix", version, disable_help_subcommand = true, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// Configuration file; it may be absent
    #[arg(short, long, value_name = "FILE", default_value = "/etc/calico/felix.cfg")]
    pub(crate) config_file: PathBuf,

    /// Format of the log on standard output; beats LogFormatScreen
    #[arg(long, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

impl LogFormat {
    /// The word of the parameter.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// What to do about a command line.
#[derive(Debug)]
pub(crate) enum Parsed {
    Run(Arguments),
    /// The answer is printed; end with this code.
    Answered(ExitCode),
}

pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Parsed {
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => Parsed::Run(arguments),
        Err(error) => {
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Nobody may be reading; the exit code still answers.
            error.print().ok();
            Parsed::Answered(if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}
