//! Remembers which iptables variant is in use, across restarts (U6.b).
//!
//! A host on which somebody loads the other variant's module first must not move by itself at the next boot. One word
//! in one file of the state directory; whatever else is in there counts as nothing.

use std::io;
use std::path::Path;

use crate::options::Variant;

/// Name of the file in the state directory.
pub const FILE: &str = "iptables-variant";

/// Returns what was remembered, if anything.
pub fn recall(directory: &Path) -> Option<Variant> {
    let text = std::fs::read_to_string(directory.join(FILE)).ok()?;
    [Variant::Legacy, Variant::Nft].into_iter().find(|variant| variant.as_str() == text.trim())
}

/// Writes down what is in use; makes the directory if need be.
///
/// # Errors
///
/// If that is impossible; what was remembered before is then still there.
pub fn remember(directory: &Path, variant: Variant) -> io::Result<()> {
    if recall(directory) == Some(variant) {
        return Ok(());
    }
    std::fs::create_dir_all(directory)?;
    // A crash leaves the old file or the new one.
    let new = directory.join(format!("{FILE}.new"));
    std::fs::write(&new, format!("{}\n", variant.as_str()))?;
    std::fs::rename(&new, directory.join(FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_is_remembered_and_nonsense_is_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("a/b");
        assert_eq!(recall(&directory), None);
        for variant in [Variant::Nft, Variant::Legacy, Variant::Legacy] {
            remember(&directory, variant).unwrap();
            assert_eq!(recall(&directory), Some(variant));
        }
        std::fs::write(directory.join(FILE), "bpf").unwrap();
        assert_eq!(recall(&directory), None);
        assert!(remember(Path::new("/proc/none"), Variant::Nft).is_err());
    }
}
