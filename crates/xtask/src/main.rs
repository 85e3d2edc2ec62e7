//! Repository chores. `cargo run -p xtask -- check` holds the tree against ARCHITECTURE.md:
//! the dependency arrows between crates, and a module comment in every source file.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks to its user")]

mod arrows;
mod comments;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: xtask check    hold the tree against its architecture; exit status 1 on a violation";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["check"] => match check() {
            Ok(violations) if violations.is_empty() => {
                println!("xtask: architecture holds");
                ExitCode::SUCCESS
            }
            Ok(violations) => {
                for violation in violations {
                    eprintln!("xtask: {violation}");
                }
                ExitCode::FAILURE
            }
            Err(error) => {
                eprintln!("xtask: {error:#}");
                ExitCode::FAILURE
            }
        },
        ["--help" | "-h"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn check() -> anyhow::Result<Vec<String>> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let mut violations = arrows::check(&root)?;
    violations.extend(comments::check(&root)?);
    Ok(violations)
}
