//! Which rule a restore program will not have, and the hunt for it (netfilter.md 10.7).
//!
//! Fed with what the program wrote on standard error, feeds the table driver. A complaint that names the
//! line of a rule is a suspicion; one that names only the `COMMIT` (legacy: the kernel refused something)
//! makes every rule of the transaction a suspect. Suspects are tried in a chain that nothing refers to
//! (see [`super::plan::probe_input`]), by halves, until one is refused all by itself, and an empty chain is not:
//! a program that refuses everything says nothing about any rule.

use std::collections::VecDeque;
use std::ops::Range;

use super::hash::RuleHash;

/// What a complaint is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// Somebody else holds the xtables lock.
    LockBusy,
    /// A rule names a set that the kernel does not have.
    SetMissing(String),
    /// Lines of the input, counted from 1.
    Lines(Vec<u32>),
    /// Nothing that we understand.
    Other,
}

impl Complaint {
    /// Reads standard error of a restore program. `lines_before` is how many lines the process had been
    /// given before this input.
    pub fn read(stderr: &str, lines_before: u32) -> Self {
        if stderr.contains("holding the xtables lock") {
            return Self::LockBusy;
        }
        if let Some(set) = missing_set(stderr) {
            return Self::SetMissing(set.to_owned());
        }
        let mut lines = Vec::new();
        let mut after_line = false;
        for word in stderr.split_ascii_whitespace() {
            if after_line {
                let number = word.trim_end_matches([':', '.', ',']).parse::<u32>().ok();
                lines.extend(number.and_then(|number| number.checked_sub(lines_before)).filter(|line| *line > 0));
            }
            after_line = matches!(word, "line" | "line:");
        }
        lines.sort_unstable();
        lines.dedup();
        if lines.is_empty() { Self::Other } else { Self::Lines(lines) }
    }
}

/// Returns what the program said as one line for the log, without its advice.
pub fn essence(stderr: &str) -> String {
    let advice = |line: &&str| !line.starts_with("Ignoring deprecated ") && !line.starts_with("Try `");
    stderr.lines().filter(advice).flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// `Set <name> doesn't exist.` (libipset through both variants)
fn missing_set(stderr: &str) -> Option<&str> {
    let (before, _) = stderr.split_once(" doesn't exist")?;
    let (_, name) = before.rsplit_once("Set ")?;
    (!name.is_empty() && !name.contains(char::is_whitespace)).then_some(name)
}

/// What stands in a line of restore input that we wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A rule is added, inserted or replaced.
    Rule {
        chain: &'a str,
        hash: RuleHash,
    },
    /// A chain is deleted.
    DeleteChain(&'a str),
    Elsewhere,
}

impl<'a> Place<'a> {
    pub fn of(input: &'a str, line: u32) -> Self {
        let index = usize::try_from(line).ok().and_then(|line| line.checked_sub(1));
        let Some(text) = index.and_then(|index| input.lines().nth(index)) else { return Self::Elsewhere };
        let mut words = text.split(' ');
        match (words.next(), words.next()) {
            (Some("--delete-chain"), Some(chain)) => Self::DeleteChain(chain),
            (Some("-A" | "-I" | "-R"), Some(chain)) => {
                hash_in(text).map_or(Self::Elsewhere, |hash| Self::Rule { chain, hash })
            }
            _ => Self::Elsewhere,
        }
    }
}

/// Returns the hash that a line of ours carries in its first comment.
pub fn hash_in(line: &str) -> Option<RuleHash> {
    let (_, rest) = line.split_once("--comment \"cali:")?;
    let (hash, _) = rest.split_once('"')?;
    RuleHash::parse(hash)
}

/// A rule that may be to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    pub chain: Box<str>,
    /// Position in the chain, from 0.
    pub rule: usize,
}

/// A search for refused rules among suspects. O(log n) probes per rule found.
#[derive(Debug)]
pub struct Hunt {
    suspects: Vec<Suspect>,
    /// Parts of the list that hold a culprit, if the complaint was about a rule at all.
    spans: VecDeque<Range<usize>>,
    found: Vec<(Suspect, String)>,
    /// The empty chain was accepted after rules were refused.
    controlled: bool,
    /// The program named the rules by line, so that each is tried by itself, and it does not refuse everything.
    pub exact: bool,
}

impl Hunt {
    /// Tries each suspect by itself.
    pub fn each(suspects: Vec<Suspect>) -> Self {
        let spans = (0..suspects.len()).map(|at| at..at + 1).collect();
        Self { suspects, spans, found: Vec::new(), controlled: false, exact: true }
    }

    /// Looks for one culprit by halves.
    pub fn by_halves(suspects: Vec<Suspect>) -> Self {
        let all = 0..suspects.len();
        let spans = if all.is_empty() { VecDeque::new() } else { VecDeque::from([all]) };
        Self { suspects, spans, found: Vec::new(), controlled: false, exact: false }
    }

    /// The rules to try next, or `None` when the hunt is over.
    pub fn probe(&self) -> Option<&[Suspect]> {
        match self.spans.front() {
            Some(span) => self.suspects.get(tried(span)),
            None => (!self.found.is_empty() && !self.controlled).then_some(&[]),
        }
    }

    /// Takes the outcome of the probe: what the program said if it refused.
    pub fn answer(&mut self, refused: Option<String>) {
        let Some(span) = self.spans.pop_front() else {
            self.controlled = refused.is_none();
            if refused.is_some() {
                self.found.clear();
                self.exact = false;
            }
            return;
        };
        let probed = tried(&span);
        match refused {
            Some(message) if span.len() == 1 => {
                self.found.extend(self.suspects.get(span.start).map(|suspect| (suspect.clone(), message)));
            }
            Some(_) => self.spans.push_front(probed),
            // The other half has not been tried; it is tried again when it has shrunk to one rule.
            None if span.len() > 1 => self.spans.push_front(probed.end..span.end),
            None => {}
        }
    }

    pub fn suspects(&self) -> &[Suspect] {
        &self.suspects
    }

    /// The refused rules with what the program said about each.
    pub fn into_found(self) -> Vec<(Suspect, String)> {
        self.found
    }
}

/// The first half of a span, or all of a span of one.
fn tried(span: &Range<usize>) -> Range<usize> {
    span.start..span.start + span.len().div_ceil(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_the_tools_are_understood() {
        let lines = |lines: &[u32]| Complaint::Lines(lines.to_vec());
        let cases = [
            ("iptables-restore: line 7 failed\n", lines(&[7])),
            (
                "iptables-restore v1.8.9 (legacy): unknown option \"--nosuch\"\nError occurred at line: 3\nTry `iptables-restore -h'",
                lines(&[3]),
            ),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \nline 5: RULE_APPEND failed (Invalid argument): rule in chain cali-b\n",
                lines(&[5]),
            ),
            (
                "x: \nline 4: RULE_APPEND failed (Invalid argument): rule in chain cali-a\nline 5: RULE_APPEND failed (Invalid argument): rule in chain cali-b\n",
                lines(&[4, 5]),
            ),
            (
                "iptables-restore v1.8.9 (legacy): Set nosuch doesn't exist.\n\nError occurred at line: 3\n",
                Complaint::SetMissing("nosuch".to_owned()),
            ),
            ("Another app is currently holding the xtables lock; waited (10s) for it to exit.\n", Complaint::LockBusy),
            ("Killed", Complaint::Other),
            ("", Complaint::Other),
        ];
        for (stderr, expected) in cases {
            assert_eq!(Complaint::read(stderr, 0), expected, "{stderr}");
        }
    }

    #[test]
    fn a_message_is_one_line_without_advice() {
        let said = "Ignoring deprecated --wait-interval option.\niptables-restore v1.8.9 (legacy): \n\nunknown option\n\
                    Try `iptables-restore -h' or 'iptables-restore --help' for more information.\n";
        assert_eq!(essence(said), "iptables-restore v1.8.9 (legacy): unknown option");
    }

    #[test]
    fn lines_count_from_the_start_of_this_input() {
        assert_eq!(Complaint::read("iptables-restore: line 107 failed", 100), Complaint::Lines(vec![7]));
        assert_eq!(Complaint::read("iptables-restore: line 99 failed", 100), Complaint::Other);
    }

    #[test]
    fn a_line_of_our_input_leads_to_its_rule() {
        let input = "*filter\n:cali-a - -\n-R cali-a 3 -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" --jump DROP\n\
                     -D cali-a 4\n--delete-chain cali-b\nCOMMIT\n";
        let hash = RuleHash::parse("AAAAAAAAAAAAAAAA").unwrap();
        let places = (0..8).map(|line| Place::of(input, line)).collect::<Vec<_>>();
        let mut expected = vec![Place::Elsewhere; 8];
        expected[3] = Place::Rule { chain: "cali-a", hash };
        expected[5] = Place::DeleteChain("cali-b");
        assert_eq!(places, expected);
    }

    #[test]
    fn a_hunt_by_halves_finds_the_culprit_in_logarithmic_time() {
        for count in 1..70_usize {
            for culprit in 0..count {
                let suspects = (0..count).map(|rule| Suspect { chain: "cali-a".into(), rule }).collect();
                let mut hunt = Hunt::by_halves(suspects);
                let mut probes = 0;
                while let Some(probe) = hunt.probe() {
                    let refused = probe.iter().any(|suspect| suspect.rule == culprit);
                    hunt.answer(refused.then(|| "no".to_owned()));
                    probes += 1;
                }
                let found = hunt.into_found();
                assert_eq!(found.len(), 1);
                assert_eq!(found[0].0.rule, culprit);
                assert!(probes <= 9, "{probes} probes for {count} rules");
            }
        }
    }

    #[test]
    fn a_program_that_refuses_everything_convicts_nobody() {
        let suspects = (0..9).map(|rule| Suspect { chain: "cali-a".into(), rule }).collect::<Vec<_>>();
        for mut hunt in [Hunt::by_halves(suspects.clone()), Hunt::each(suspects)] {
            while hunt.probe().is_some() {
                hunt.answer(Some("no".to_owned()));
            }
            assert!(hunt.into_found().is_empty());
        }
    }

    #[test]
    fn a_hunt_convicts_nobody_without_a_confession() {
        let suspects = (0..9).map(|rule| Suspect { chain: "cali-a".into(), rule }).collect::<Vec<_>>();
        for mut hunt in [Hunt::by_halves(suspects.clone()), Hunt::each(suspects), Hunt::by_halves(Vec::new())] {
            while hunt.probe().is_some() {
                hunt.answer(None);
            }
            assert!(hunt.into_found().is_empty());
        }
    }
}
