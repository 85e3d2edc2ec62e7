//! Repository chores. `cargo run -p xtask -- check` holds the tree against ARCHITECTURE.md:
//! the dependency arrows between crates, and a module comment in every source file.
//! `cargo run -p xtask -- mutants` seeds faults and asks the tests whether they notice.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool speaks to its user")]

mod arrows;
mod comments;
mod mutants;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
usage: xtask check      hold the tree against its architecture; exit status 1 on a violation
       xtask mutants [--lists NAME,NAME] [--only TEXT] [--jobs N] [--list]
                        seed faults into graph and compiler, one at a time, and run the tests;
                        only those of these lists, or whose name or file contains the text;
                        --list names them and runs nothing;
                        exit status 1 if a fault survives or does not compile";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["check"] => report(check(), "architecture holds"),
        ["mutants", ref rest @ ..] => match mutants_options(rest) {
            Some(options) => {
                let good = if options.list { "nothing was run" } else { "no fault survives" };
                report(mutants::run(&root(), &options), good)
            }
            None => usage(),
        },
        ["--help" | "-h"] => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// Prints what was found; success if that is nothing.
fn report(found: anyhow::Result<Vec<String>>, good: &str) -> ExitCode {
    match found {
        Ok(found) if found.is_empty() => {
            println!("xtask: {good}");
            ExitCode::SUCCESS
        }
        Ok(found) => {
            for line in found {
                eprintln!("xtask: {line}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn mutants_options(arguments: &[&str]) -> Option<mutants::Options> {
    let mut options = mutants::Options { jobs: 1, ..mutants::Options::default() };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match *argument {
            "--lists" => options.lists = arguments.next()?.split(',').map(str::to_owned).collect(),
            "--only" => options.only = (*arguments.next()?).to_owned(),
            "--jobs" => options.jobs = arguments.next()?.parse().ok()?,
            "--list" => options.list = true,
            _ => return None,
        }
    }
    Some(options)
}

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn check() -> anyhow::Result<Vec<String>> {
    let root = root();
    let mut violations = arrows::check(&root)?;
    violations.extend(comments::check(&root)?);
    Ok(violations)
}
