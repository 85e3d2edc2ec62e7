//! Which iptables variant to use, and where its programs are (netfilter.md 18.1, operations.md 10.4).

use std::path::{Path, PathBuf};
use std::time::Duration;

use model::Family;
use tracing::warn;

use super::features::{Features, Overrides};
use crate::error::DriverError;
use crate::exec;
use crate::options::Variant;

/// The programs of one family and variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    pub save: PathBuf,
    pub restore: PathBuf,
}

impl Programs {
    /// Looks for the programs that name their variant, then for those that do not.
    ///
    /// # Errors
    ///
    /// If neither is installed.
    pub fn find(family: Family, variant: Variant, directories: &[PathBuf]) -> Result<Self, DriverError> {
        Ok(Self {
            save: find(family, variant, "save", directories)?,
            restore: find(family, variant, "restore", directories)?,
        })
    }

    /// Like [`Self::find`], but only programs that name their variant.
    pub fn find_named(family: Family, variant: Variant, directories: &[PathBuf]) -> Option<Self> {
        let named = |verb| first(directories, &named_program(family, variant, verb));
        Some(Self { save: named("save")?, restore: named("restore")? })
    }
}

/// Where programs are looked for: `PATH`, and the places where they are on every distribution.
pub fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).collect()
}

/// Returns the names of the tables that the legacy variant has made in this network namespace; `None` if the
/// kernel has no legacy tables at all. Looking any closer would make them.
pub fn legacy_tables(family: Family) -> Option<String> {
    let name = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    // Kernels before 3.17 have no `thread-self`.
    let read = |directory: &str| std::fs::read_to_string(format!("{directory}/{name}")).ok();
    if Path::new("/proc/thread-self").exists() { read("/proc/thread-self/net") } else { read("/proc/net") }
}

/// Returns everything that a variant holds, without a promise of completeness. Makes no tables: without the name of a
/// table the legacy variant lists those that the kernel has.
pub async fn listing(family: Family, variant: Variant, directories: &[PathBuf], limit: Duration) -> String {
    if variant == Variant::Legacy && legacy_tables(family).is_none_or(|names| names.trim().is_empty()) {
        return String::new();
    }
    let Ok(programs) = Programs::find(family, variant, directories) else { return String::new() };
    match exec::run(&programs.save, &[], "", limit).await {
        Ok(finished) if finished.status == 0 => finished.stdout,
        Ok(_) | Err(_) => String::new(),
    }
}

/// Asks the restore program what it is and what it can do; changes nothing.
///
/// # Errors
///
/// If it cannot be run at all.
pub async fn probe(
    programs: &Programs,
    overrides: &Overrides,
    limit: Duration,
) -> Result<(Variant, Features), DriverError> {
    let version = exec::run(&programs.restore, &["--version".to_owned()], "", limit).await?;
    let kernel = std::fs::read_to_string("/proc/version").unwrap_or_default();
    // Distributions gave older versions the option too, so the version is not asked but the program.
    let words = ["--noflush", "--test", "--wait", "1", "--wait-interval", "50000"].map(str::to_owned);
    let lock = exec::run(&programs.restore, &words, "", limit).await?;
    let takes_lock = lock.status == 0 && !lock.stderr.contains("unrecognized option");
    let variant = if version.stdout.contains("(nf_tables)") { Variant::Nft } else { Variant::Legacy };
    if version.status != 0 {
        warn!(program = %programs.restore.display(), "the program does not tell its version, the oldest is assumed");
    }
    Ok((variant, overrides.apply(Features::of(&version.stdout, &kernel, takes_lock))))
}

fn find(family: Family, variant: Variant, verb: &str, directories: &[PathBuf]) -> Result<PathBuf, DriverError> {
    let candidates = [named_program(family, variant, verb), format!("{}-{verb}", stem(family))];
    let found = candidates.iter().find_map(|name| first(directories, name));
    found.ok_or_else(|| DriverError::NoProgram { candidates: candidates.join(", ") })
}

fn named_program(family: Family, variant: Variant, verb: &str) -> String {
    format!("{}-{}-{verb}", stem(family), variant.as_str())
}

const fn stem(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn first(directories: &[PathBuf], name: &str) -> Option<PathBuf> {
    directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_name_their_variant_come_before_those_that_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| std::fs::write(directory.path().join(name), "").unwrap();
        let directories = [directory.path().to_owned()];
        let save = |variant| {
            let programs = Programs::find(Family::V4, variant, &directories)?;
            Ok::<_, DriverError>(programs.save.file_name().unwrap().to_str().unwrap().to_owned())
        };
        let missing = save(Variant::Nft).unwrap_err().to_string();
        assert_eq!(missing, "none of iptables-nft-save, iptables-save is installed");
        place("iptables-save");
        place("iptables-restore");
        assert_eq!(save(Variant::Nft).unwrap(), "iptables-save");
        place("iptables-nft-save");
        place("iptables-nft-restore");
        assert_eq!(save(Variant::Nft).unwrap(), "iptables-nft-save");
        assert_eq!(save(Variant::Legacy).unwrap(), "iptables-save");
        assert_eq!(Programs::find_named(Family::V4, Variant::Legacy, &directories), None);
        assert!(Programs::find(Family::V6, Variant::Nft, &directories).is_err());
    }
}
