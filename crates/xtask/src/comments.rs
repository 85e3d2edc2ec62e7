//! Checks that every source file begins with a module comment that says something.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

/// Returns one line per file without a comment.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in ["crates", "tests", "benches"] {
        visit(root, Path::new(folder), &mut found)?;
    }
    Ok(found)
}

fn visit(root: &Path, folder: &Path, found: &mut Vec<String>) -> anyhow::Result<()> {
    let mut entries = fs::read_dir(root.join(folder))
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("reading {}", folder.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = folder.join(entry.file_name());
        if root.join(&path).is_dir() {
            visit(root, &path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(root.join(&path)).with_context(|| format!("reading {}", path.display()))?;
            if !has_module_comment(&text) {
                found.push(format!("{}: no module comment (`//! …`) at the top", path.display()));
            }
        }
    }
    Ok(())
}

fn has_module_comment(text: &str) -> bool {
    text.lines()
        .find(|line| !line.trim().is_empty())
        .is_some_and(|line| line.strip_prefix("//!").is_some_and(|comment| comment.trim().len() > 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_must_come_first_and_say_something() {
        assert!(has_module_comment("\n//! Parses selectors.\nuse x;"));
        for text in
            ["", "use x;\n//! Parses selectors.", "//!\nuse x;", "//! todo\n", "/// Parses selectors.\nfn x() {}"]
        {
            assert!(!has_module_comment(text), "{text:?}");
        }
    }
}
