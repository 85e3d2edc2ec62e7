//! Bar U18.b: what the dataplane can do is tested for both families, or a comment says why not.
//!
//! A test of the dataplane or of the whole agent has to be about both families: itself, or a function of the same file
//! that it calls, or a twin of the same name. If only one is meant, or none, the test or the head of its file has a
//! sentence that begins with `One family:` and gives the reason. Reads the sources, runs nothing.
#![allow(clippy::unwrap_used, reason = "a test that meets something unexpected fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Where the tests are that this is about, from the root of the repository.
const FOLDERS: &[&str] = &["crates/dataplane/tests", "tests/tests"];

/// Files without tests of the dataplane.
const ELSEWHERE: &[(&str, &str)] = &[
    ("families.rs", "is this check"),
    ("rule_vectors.rs", "compares text with vectors, which name their family"),
    ("rule_vectors_kernel.rs", "goes through the same vectors"),
];

/// The sentence that gives the reason for one family.
const REASON: &str = "One family:";

/// What a test of both families says, somewhere.
const BOTH: &[&str] = &["Family::BOTH", "Solo::new()", "dual_stack(", "dual stack"];

/// Or both words of a pair.
const PAIRS: &[(&str, &str)] = &[("V4", "V6"), ("\"iptables", "ip6tables"), ("10.65.", "fd10:"), ("ipv4/", "ipv6/")];

#[test]
fn every_test_of_the_dataplane_is_about_both_families_or_says_why_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = 0;
    let mut complaints = Vec::new();
    for folder in FOLDERS {
        for path in sources(&root.join(folder)) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if ELSEWHERE.iter().any(|(file, _)| *file == name) {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let head: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
            if head.contains(REASON) {
                found += text.matches("#[test]").count();
                continue;
            }
            let functions = functions(&text);
            for (test, function) in functions.iter().filter(|(_, function)| function.is_test) {
                found += 1;
                let reachable = head.clone() + &reachable(&functions, test);
                let twins = [test.replace("ipv4", "ipv6"), test.replace("ipv6", "ipv4")];
                let both =
                    about_both(&reachable) || twins.iter().any(|twin| twin != test && functions.contains_key(twin));
                match (both, function.text.contains(REASON)) {
                    (true, false) | (false, true) => {}
                    (false, false) => complaints.push(format!("{folder}/{name}: {test} is about one family at most")),
                    (true, true) => complaints.push(format!("{folder}/{name}: {test} gives a reason and needs none")),
                }
            }
        }
    }
    assert!(found > 100, "only {found} tests");
    assert!(
        complaints.is_empty(),
        "{}\nMake a table of cases with both, or write a comment `// {REASON} <why>.` in the test.",
        complaints.join("\n")
    );
}

#[test]
fn a_test_is_judged_by_what_it_calls() {
    let text = "\
/// Does it.
#[test]
fn one() {
    help(1);
}

fn help(number: u8) {
    for family in Family::BOTH {}
}

#[test]
fn two() {
    // One family: there is no other.
    other();
}

#[test]
fn three() {
    other();
}

fn other() {}
";
    let functions = functions(text);
    let judged = |name: &str| (about_both(&reachable(&functions, name)), functions[name].text.contains(REASON));
    assert_eq!(judged("one"), (true, false));
    assert_eq!(judged("two"), (false, true));
    assert_eq!(judged("three"), (false, false));
    let tests: Vec<&String> = functions.iter().filter(|(_, function)| function.is_test).map(|(name, _)| name).collect();
    assert_eq!(tests, ["one", "three", "two"]);
}

#[derive(Debug, Default)]
struct Function {
    is_test: bool,
    /// With the comments before it.
    text: String,
}

/// Returns the functions at the top of a file, by name. What lies between two of them belongs to the second.
fn functions(text: &str) -> BTreeMap<String, Function> {
    let mut functions = BTreeMap::new();
    let mut current = Function::default();
    let mut name = None;
    for line in text.lines() {
        current.is_test |= line == "#[test]" || line.starts_with("#[tokio::test");
        let head = ["fn ", "pub fn ", "async fn "].iter().find_map(|start| line.strip_prefix(start));
        if let Some(rest) = head {
            name = rest.split(['(', '<']).next().map(str::to_owned);
        }
        current.text += line;
        current.text.push('\n');
        let ends = line == "}" || (head.is_some() && line.ends_with('}'));
        if ends {
            let function = std::mem::take(&mut current);
            if let Some(name) = name.take() {
                functions.insert(name, function);
            }
        }
    }
    functions
}

/// Returns the text of a function and of all that it calls.
fn reachable(functions: &BTreeMap<String, Function>, name: &str) -> String {
    let mut todo = vec![name.to_owned()];
    let mut seen = BTreeSet::new();
    let mut text = String::new();
    while let Some(name) = todo.pop() {
        let Some(function) = functions.get(&name) else { continue };
        if !seen.insert(name) {
            continue;
        }
        text += &function.text;
        let uses = |other: &&String| {
            [format!("{other}("), format!("({other})")].iter().any(|call| function.text.contains(call))
        };
        todo.extend(functions.keys().filter(uses).cloned());
    }
    text
}

fn about_both(text: &str) -> bool {
    BOTH.iter().any(|word| text.contains(word))
        || PAIRS.iter().any(|(one, two)| text.contains(one) && text.contains(two))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect();
    files.sort();
    files
}
