//! Seeds faults into graph, compiler and drivers, one at a time, and asks the tests whether they notice.
//!
//! The faults are in `crates/xtask/mutants/*.txt`:
//!
//! ```text
//! ## an accepted packet is marked as passed
//! file: crates/compiler/src/policy.rs
//! tests: compiler
//! -         Verdict::Allow => (marks.accept, 'A', Action::Return),
//! +         Verdict::Allow => (marks.pass, 'A', Action::Return),
//! ```
//!
//! The lines after `-` must occur exactly once in the file, so that a fault cannot silently miss the
//! code it was written for; a fault that does not compile is an error, not a success.
//! `tests:` names packages, or one test file as `package/file`, in the order in which they are asked.
//!
//! Works on a copy of the tree below the target folder, one run at a time; the tree itself is never
//! touched. SIGINT and SIGTERM end the run, with everything that it started.

mod process;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use process::{End, STOP};

/// A test run that takes longer hangs, and a fault that makes it hang is caught.
const HANGS_AFTER: Duration = Duration::from_secs(900);

/// One seeded fault.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mutant {
    /// Name of the file it was read from, without its ending.
    list: String,
    name: String,
    file: PathBuf,
    tests: Vec<String>,
    find: String,
    replace: String,
}

/// What became of one fault.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The test that failed first, and its package.
    Caught(String),
    Survived,
    /// The fault itself is wrong.
    Unusable(String),
    /// We were asked to stop before there was an answer.
    Interrupted,
}

/// What the caller asked for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Only the faults of these lists; none means all.
    pub(crate) lists: Vec<String>,
    /// Only the faults whose name or file contains this.
    pub(crate) only: String,
    /// Copies of the tree that are worked on side by side.
    pub(crate) jobs: usize,
    /// Name the faults and check that they fit the code; run nothing.
    pub(crate) list: bool,
}

/// Runs the faults and returns the names of those that nobody noticed.
pub(crate) fn run(root: &Path, options: &Options) -> anyhow::Result<Vec<String>> {
    let mutants = chosen(read(&root.join("crates/xtask/mutants"))?, options)?;
    for mutant in &mutants {
        let text =
            std::fs::read_to_string(root.join(&mutant.file)).with_context(|| mutant.file.display().to_string())?;
        mutant.apply(&text).with_context(|| mutant.to_string())?;
        if options.list {
            println!("{mutant}");
        }
    }
    println!("xtask: {} faults, each fits the code", mutants.len());
    if options.list {
        return Ok(Vec::new());
    }

    process::stop_on_signals()?;
    let base = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from).join("mutants");
    let _lock = lock(&base)?;
    let packages: BTreeSet<&str> = mutants.iter().flat_map(|mutant| &mutant.tests).map(String::as_str).collect();
    let jobs = options.jobs.clamp(1, mutants.len());
    let trees: Vec<Tree> =
        (0..jobs).map(|job| Tree::copy(root, &base.join(job.to_string()))).collect::<Result<_, _>>()?;
    let first = trees.first().context("no tree")?;
    for package in packages {
        println!("xtask: the tests of {package} without a fault ...");
        match first.test(package)? {
            Outcome::Survived => (),
            Outcome::Interrupted => bail!("interrupted before the first fault"),
            Outcome::Caught(why) | Outcome::Unusable(why) => {
                bail!("the tests of {package} fail without any fault: {why}")
            }
        }
    }

    let all = mutants.len();
    let next = Mutex::new(mutants.iter());
    let done: Mutex<Vec<(&Mutant, Outcome)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let workers: Vec<_> = trees
            .iter()
            .map(|tree| {
                scope.spawn(|| -> anyhow::Result<()> {
                    loop {
                        let Some(mutant) = next.lock().ok().and_then(|mut next| next.next()) else { return Ok(()) };
                        let start = Instant::now();
                        let outcome = tree.judge(mutant)?;
                        if outcome == Outcome::Interrupted {
                            return Ok(());
                        }
                        let seconds = start.elapsed().as_secs_f64();
                        let Ok(mut done) = done.lock() else { return Ok(()) };
                        println!("{:3}/{all} {seconds:5.0} s  {outcome}  {}: {mutant}", done.len() + 1, mutant.list);
                        done.push((mutant, outcome));
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => bail!("a worker died"),
        })
    })?;
    let done = done.into_inner().unwrap_or_default();
    let is_caught = |outcome: &Outcome| matches!(outcome, Outcome::Caught(_));
    let mut bad: Vec<String> = done
        .iter()
        .filter(|(_, outcome)| !is_caught(outcome))
        .map(|(mutant, outcome)| format!("{outcome}  {}: {mutant}", mutant.list))
        .collect();
    bad.sort();
    println!("xtask: {} of {} faults caught", done.len() - bad.len(), done.len());
    if STOP.load(Ordering::Relaxed) {
        bad.push(format!("interrupted: {} of {all} faults were not judged", all - done.len()));
    }
    Ok(bad)
}

/// The faults that were asked for.
fn chosen(mut mutants: Vec<Mutant>, options: &Options) -> anyhow::Result<Vec<Mutant>> {
    let known: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.list.as_str()).collect();
    if let Some(list) = options.lists.iter().find(|list| !known.contains(list.as_str())) {
        bail!("no list of faults is named {list:?}, there are {known:?}");
    }
    mutants.retain(|mutant| {
        let fits = mutant.name.contains(&options.only) || mutant.file.to_string_lossy().contains(&options.only);
        fits && (options.lists.is_empty() || options.lists.contains(&mutant.list))
    });
    ensure!(!mutants.is_empty(), "no fault matches {:?}", options.only);
    Ok(mutants)
}

/// Two runs in one folder would build each other's faults. The lock goes with the process that has it.
fn lock(base: &Path) -> anyhow::Result<File> {
    std::fs::create_dir_all(base).with_context(|| base.display().to_string())?;
    let path = base.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another run is under way in this target folder: it holds {}", path.display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// A copy of the repository with a target folder of its own.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
    target: PathBuf,
}

impl Tree {
    /// Copies what git knows of, as it is in the working tree.
    fn copy(root: &Path, base: &Path) -> anyhow::Result<Self> {
        let tree = Self { root: base.join("tree"), target: base.join("target") };
        if tree.root.exists() {
            std::fs::remove_dir_all(&tree.root)?;
        }
        std::fs::create_dir_all(&tree.target)?;
        // An earlier run that was killed in the middle of a build may have left half of the compiler's notes, from
        // which nothing links any more.
        let notes = tree.target.join("debug/incremental");
        if notes.exists() {
            std::fs::remove_dir_all(&notes)?;
        }
        let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output().context("git ls-files")?;
        ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
        for name in String::from_utf8_lossy(&listed.stdout).split('\0').filter(|name| !name.is_empty()) {
            let (from, to) = (root.join(name), tree.root.join(name));
            if !from.is_file() {
                continue;
            }
            std::fs::create_dir_all(to.parent().context("a file without a folder")?)?;
            std::fs::copy(&from, &to).with_context(|| from.display().to_string())?;
        }
        Ok(tree)
    }

    fn judge(&self, mutant: &Mutant) -> anyhow::Result<Outcome> {
        let path = self.root.join(&mutant.file);
        let original = std::fs::read_to_string(&path)?;
        std::fs::write(&path, mutant.apply(&original)?)?;
        let mut outcome = Outcome::Survived;
        for package in &mutant.tests {
            outcome = self.test(package)?;
            if outcome != Outcome::Survived {
                break;
            }
        }
        std::fs::write(&path, original)?;
        Ok(outcome)
    }

    /// Builds and runs the tests of a package.
    fn test(&self, package: &str) -> anyhow::Result<Outcome> {
        let log = self.target.join("tests.log");
        let read = || std::fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        match process::run(self.cargo(package).arg("--no-run"), &log, HANGS_AFTER, &STOP)? {
            End::Status(status) if status.success() => (),
            End::Status(_) => {
                let text = read()?;
                let error = text.lines().find(|line| line.starts_with("error")).unwrap_or("the build fails");
                return Ok(Outcome::Unusable(error.to_owned()));
            }
            End::TookTooLong => return Ok(Outcome::Unusable("the build hangs".to_owned())),
            End::Interrupted => return Ok(Outcome::Interrupted),
        }
        let end = process::run(&mut self.cargo(package), &log, HANGS_AFTER, &STOP)?;
        Ok(match end {
            End::Interrupted => Outcome::Interrupted,
            End::TookTooLong => Outcome::Caught(format!("{package}: the tests hang")),
            End::Status(status) if status.success() => Outcome::Survived,
            End::Status(status) => Outcome::Caught(match first_failure(&read()?) {
                Some(test) => format!("{package}: {test}"),
                None => format!("{package}: {status}"),
            }),
        })
    }

    fn cargo(&self, package: &str) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let (package, test) = match package.split_once('/') {
            Some((package, test)) => (package, Some(test)),
            None => (package, None),
        };
        command.args(["test", "--quiet", "--package", package]);
        match test {
            Some(test) => command.args(["--test", test]),
            None => command.args(["--lib", "--tests"]),
        };
        command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_INCREMENTAL", "1")
            // Who caught the fault matters, not the smallest history that shows it.
            .env("PROPTEST_MAX_SHRINK_ITERS", "0")
            .stdin(Stdio::null());
        command
    }
}

/// The name of the first test that failed, from the output of a test run.
fn first_failure(output: &str) -> Option<&str> {
    output.lines().find_map(|line| line.strip_prefix("---- ")?.split(' ').next())
}

impl Mutant {
    /// Returns the file's text with the fault in it.
    fn apply(&self, text: &str) -> anyhow::Result<String> {
        match text.matches(&self.find).count() {
            1 => Ok(text.replacen(&self.find, &self.replace, 1)),
            n => bail!("{} occurs {n} times in {}:\n{}", "the text to change", self.file.display(), self.find),
        }
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.file.display())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught(test) => write!(f, "caught    [{test}]"),
            Self::Survived => f.write_str("SURVIVED "),
            Self::Unusable(error) => write!(f, "UNUSABLE  [{error}]"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// Reads all lists of a folder, in order of their names.
fn read(folder: &Path) -> anyhow::Result<Vec<Mutant>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let mut mutants = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "txt")) {
        let text = std::fs::read_to_string(file)?;
        let list = file.file_stem().unwrap_or_default().to_string_lossy();
        mutants.extend(parse(&list, &text).with_context(|| file.display().to_string())?);
    }
    let names: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.name.as_str()).collect();
    ensure!(names.len() == mutants.len(), "two faults have one name");
    Ok(mutants)
}

fn parse(list: &str, text: &str) -> anyhow::Result<Vec<Mutant>> {
    let mut mutants = Vec::new();
    for part in text.split("\n## ").skip(1) {
        let mut lines = part.lines();
        let name = lines.next().unwrap_or_default().trim().to_owned();
        let (mut file, mut tests, mut find, mut replace) = (None, Vec::new(), Vec::new(), Vec::new());
        for line in lines {
            if let Some(path) = line.strip_prefix("file: ") {
                file = Some(PathBuf::from(path));
            } else if let Some(packages) = line.strip_prefix("tests: ") {
                tests = packages.split_whitespace().map(str::to_owned).collect();
            } else if let Some(text) = line.strip_prefix('-') {
                find.push(text);
            } else if let Some(text) = line.strip_prefix('+') {
                replace.push(text);
            } else if !line.trim().is_empty() {
                bail!("{name}: a line that is nothing: {line}");
            }
        }
        let file = file.with_context(|| format!("{name}: no file"))?;
        ensure!(!tests.is_empty() && !find.is_empty(), "{name}: no tests, or nothing to find");
        let (find, replace) = (find.join("\n"), replace.join("\n"));
        mutants.push(Mutant { list: list.to_owned(), name, file, tests, find, replace });
    }
    Ok(mutants)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "Comment.\n\n## a name\nfile: a/b.rs\ntests: x y\n- one\n-  two\n+ three\n\n## other\nfile: c.rs\ntests: x\n-gone\n";

    #[test]
    fn lists_are_read() {
        let mutants = parse("list", LIST).unwrap();
        assert_eq!(mutants.len(), 2);
        assert_eq!(mutants[0].find, " one\n  two");
        assert_eq!(mutants[0].replace, " three");
        assert_eq!(mutants[0].tests, ["x", "y"]);
        assert_eq!(mutants[1].replace, "");
        assert!(parse("list", "\n## a name\nfile: x\ntests: y\nnonsense\n-x\n").is_err());
        assert!(parse("list", "\n## a name\nfile: x\n-x\n").is_err());
    }

    #[test]
    fn a_fault_fits_only_where_its_text_occurs_once() {
        let mutant = &parse("list", LIST).unwrap()[1];
        assert_eq!(mutant.apply("it is gone now").unwrap(), "it is  now");
        assert!(mutant.apply("gone and gone").is_err());
        assert!(mutant.apply("here").is_err());
    }

    #[test]
    fn faults_are_chosen_by_list_and_by_text() {
        let all = [parse("one", LIST).unwrap(), parse("two", LIST).unwrap()].concat();
        let names = |lists: &[&str], only: &str| {
            let lists = lists.iter().map(|list| (*list).to_owned()).collect();
            let options = Options { lists, only: only.to_owned(), ..Options::default() };
            let found = chosen(all.clone(), &options)?;
            anyhow::Ok(found.iter().map(|mutant| format!("{}/{}", mutant.list, mutant.name)).collect::<Vec<_>>())
        };
        assert_eq!(names(&[], "").unwrap().len(), 4);
        assert_eq!(names(&["two"], "").unwrap(), ["two/a name", "two/other"]);
        assert_eq!(names(&["two", "one"], "c.rs").unwrap(), ["one/other", "two/other"]);
        assert!(names(&["two", "three"], "").unwrap_err().to_string().contains("three"));
        assert!(names(&["two"], "nothing").is_err());
    }

    #[test]
    fn a_second_run_in_one_folder_is_refused_until_the_first_ends() {
        let base = std::env::temp_dir().join(format!("xtask-lock-{}", std::process::id()));
        let first = lock(&base).unwrap();
        let error = lock(&base).unwrap_err().to_string();
        assert!(error.contains(&base.join("lock").display().to_string()), "{error}");
        drop(first);
        lock(&base).unwrap();
        std::fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn the_first_failing_test_is_named() {
        let output = "running 2 tests\n.F\nfailures:\n\n---- policy::a_test stdout ----\nthread panicked\n";
        assert_eq!(first_failure(output), Some("policy::a_test"));
        assert_eq!(first_failure("ok"), None);
    }

    #[test]
    fn every_fault_fits_the_code_as_it_is() {
        let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        for mutant in read(&root.join("crates/xtask/mutants")).unwrap() {
            let text = std::fs::read_to_string(root.join(&mutant.file)).unwrap();
            mutant.apply(&text).unwrap_or_else(|error| panic!("{mutant}: {error:#}"));
        }
    }
}
