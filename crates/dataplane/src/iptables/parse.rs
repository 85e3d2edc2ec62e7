//! What a save program says about one table (netfilter.md 16.3).
//!
//! Fed with the program's output, feeds the table driver with a [`View`]. Invariant: a view exists only
//! if the output was complete; anything cut off, mixed up or unrepresentable is an error, so that
//! nothing is ever deleted on the strength of half a listing (I3). What is ours is told by chain name,
//! rule hash or jump target, word by word and never by a look at the raw line: the text of somebody
//! else's comment makes nothing ours (I6).

use std::borrow::Cow;
use std::collections::BTreeMap;

use program::Table;

use super::hash::RuleHash;

/// Beginnings of the names of chains that we or a predecessor made (netfilter.md 3.1).
pub const OUR_PREFIXES: [&str; 8] =
    ["cali-", "califw-", "calitw-", "califh-", "calith-", "calipi-", "calipo-", "felix-"];

/// Returns whether a chain of this name is ours. `calico-…` is not: OpenStack's DHCP agent uses it.
pub fn is_our_chain(name: &str) -> bool {
    OUR_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// What one table holds, as far as it concerns us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Our chains with the hashes of their rules; `None` is a rule without a hash of ours.
    pub ours: BTreeMap<Box<str>, Vec<Option<RuleHash>>>,
    /// Base chains, and foreign chains with a rule of ours in them.
    pub shared: BTreeMap<Box<str>, Vec<Entry>>,
}

/// A rule of ours in a shared chain, by the kernel's number for it, which is never given to another rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    pub chain: Box<str>,
    pub handle: u64,
}

/// A rule in a chain that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Foreign,
    /// A rule of ours: its hash, unless an agent made it that had none, and its text after the chain's name.
    Ours {
        hash: Option<RuleHash>,
        rule: Box<str>,
    },
    /// A rule of ours whose text is not known, because the table was read over netlink.
    Numbered {
        hash: Option<RuleHash>,
        handle: u64,
    },
}

impl Entry {
    /// The hash, if the rule is ours and has one.
    pub fn hash(&self) -> Option<RuleHash> {
        match self {
            Self::Foreign => None,
            Self::Ours { hash, .. } | Self::Numbered { hash, .. } => *hash,
        }
    }
}

/// Why the output is not to be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Counted from 1.
    pub line: u32,
    pub reason: String,
}

/// Whether a listing is whole, as a look at its two ends tells (U6.e). The exit status proves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Complete {
        /// There are base chains that the program does not list, made by others with `nft`.
        hides_base_chains: bool,
    },
    /// The table holds rules that the program cannot represent.
    Incompatible,
    /// Nothing, or not all of it, was printed.
    CutOff,
}

/// Judges the output of `<save program> -t <table>`.
pub fn judge(table: Table, output: &str) -> Judgement {
    let mut hides_base_chains = false;
    let mut lines = output.lines();
    let header = loop {
        match lines.next() {
            Some(line) if is_incompatible(line) => return Judgement::Incompatible,
            Some(line) if line.starts_with('#') => {
                hides_base_chains |=
                    line.starts_with("# Table ") && line.contains(" contains incompatible base-chains");
            }
            other => break other,
        }
    };
    let has_header = header.and_then(|line| line.strip_prefix('*')) == Some(table.as_str());
    let mut end = output.trim_end_matches('\n').rsplit('\n');
    let has_end = output.ends_with('\n')
        && end.next().is_some_and(|line| line.starts_with(COMPLETION))
        && end.next() == Some("COMMIT");
    if has_header && has_end { Judgement::Complete { hides_base_chains } } else { Judgement::CutOff }
}

/// The last line that every save program prints, after all else.
pub(super) const COMPLETION: &str = "# Completed on ";

fn is_incompatible(line: &str) -> bool {
    incompatible_table(line).is_some()
}

/// The table of which this line says that the program cannot represent it.
pub(super) fn incompatible_table(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("# Table ")?;
    let (name, _) = rest.split_once(" is incompatible, use 'nft' tool")?;
    Some(name.trim_start_matches('`').trim_end_matches('\''))
}

/// Reads the output of `<save program> -t <table>`. No output is no view: programs that fail print nothing
/// and may still say that they succeeded.
///
/// # Errors
///
/// If the table cannot be represented by the program, if the output belongs to another table or ends
/// before `COMMIT` and the comment that says so, or if a rule names a chain that was not declared.
pub fn parse(table: Table, output: &str) -> Result<View, Unreadable> {
    let mut view = View::default();
    let mut state = State::Before;
    let mut number = 0;
    for line in output.lines() {
        number += 1;
        let fail = |reason: String| Err(Unreadable { line: number, reason });
        if line.starts_with('#') {
            if is_incompatible(line) {
                return fail("the table holds rules that the program cannot represent".to_owned());
            }
            if state == State::After && line.starts_with(COMPLETION) {
                state = State::Completed;
            }
            continue;
        }
        if let Some(name) = line.strip_prefix('*') {
            if state != State::Before || name != table.as_str() {
                return fail(format!("unexpected table `{name}`"));
            }
            state = State::Inside;
        } else if line == "COMMIT" {
            if state != State::Inside {
                return fail("COMMIT without a table".to_owned());
            }
            state = State::After;
        } else if let Some(rest) = line.strip_prefix(':') {
            if state != State::Inside {
                return fail("chain outside of a table".to_owned());
            }
            declare(&mut view, rest);
        } else if let Some(rest) = line.strip_prefix("-A ") {
            if state != State::Inside {
                return fail("rule outside of a table".to_owned());
            }
            if !add(&mut view, table, rest) {
                return fail("rule in a chain that was not declared".to_owned());
            }
        }
    }
    let missing = match state {
        State::Before => "there is no table in the output",
        State::Inside => "output ends before COMMIT",
        State::After => "output ends before the comment that completes it",
        State::Completed if !output.ends_with('\n') => "output ends inside a line",
        State::Completed => "",
    };
    if !missing.is_empty() {
        return Err(Unreadable { line: number, reason: missing.to_owned() });
    }
    view.shared.retain(|name, rules| is_base_chain(name) || rules.iter().any(|rule| *rule != Entry::Foreign));
    Ok(view)
}

/// Returns of each rule in a listing whether it is in a chain of ours or made by us.
pub(super) fn rules_are_ours(listing: &str) -> impl Iterator<Item = bool> {
    listing.lines().filter_map(|line| line.strip_prefix("-A ")).map(|rest| {
        let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
        let marks = Marks::of(rule);
        is_our_chain(chain) || marks.tag.is_some() || marks.jumps_to_us
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Inside,
    After,
    Completed,
}

fn declare(view: &mut View, rest: &str) {
    let name = rest.split_ascii_whitespace().next().unwrap_or_default();
    if is_our_chain(name) {
        view.ours.entry(name.into()).or_default();
    } else {
        view.shared.entry(name.into()).or_default();
    }
}

fn add(view: &mut View, table: Table, rest: &str) -> bool {
    let (name, rule) = rest.split_once(' ').unwrap_or((rest, ""));
    if let Some(rules) = view.ours.get_mut(name) {
        rules.push(Marks::of(rule).hash());
        return true;
    }
    let Some(rules) = view.shared.get_mut(name) else { return false };
    let marks = Marks::of(rule);
    let ours = marks.tag.is_some() || marks.jumps_to_us || (table == Table::Nat && is_ancient(name, rule));
    rules.push(if ours { Entry::Ours { hash: marks.hash(), rule: rule.into() } } else { Entry::Foreign });
    true
}

pub(super) fn is_base_chain(name: &str) -> bool {
    matches!(name, "PREROUTING" | "INPUT" | "FORWARD" | "OUTPUT" | "POSTROUTING")
}

/// Rules that agents before 2.0 put straight into nat POSTROUTING.
fn is_ancient(chain: &str, rule: &str) -> bool {
    const TUNNEL: &str =
        "-o tunl0 -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE";
    chain == "POSTROUTING" && (rule == TUNNEL || Words(rule).any(|word| word == "felix-masq-ipam-pools"))
}

/// What makes a rule ours.
#[derive(Default)]
struct Marks<'a> {
    /// What follows `cali:` in the first such comment.
    tag: Option<Cow<'a, str>>,
    jumps_to_us: bool,
}

impl<'a> Marks<'a> {
    fn of(rule: &'a str) -> Self {
        let mut marks = Self::default();
        let mut option = Cow::Borrowed("");
        for word in Words(rule) {
            match option.as_ref() {
                "--comment" if marks.tag.is_none() => marks.tag = tag(&word),
                "-j" | "--jump" if is_our_chain(&word) => marks.jumps_to_us = true,
                _ => {}
            }
            // The value of a comment is no option, whatever it says.
            option = if option == "--comment" { Cow::Borrowed("") } else { word };
        }
        marks
    }

    fn hash(&self) -> Option<RuleHash> {
        self.tag.as_deref().and_then(RuleHash::parse)
    }
}

/// Returns whether a comment is one that we put on our rules.
pub(crate) fn is_our_comment(comment: &str) -> bool {
    tag(&Cow::Borrowed(comment)).is_some()
}

/// The hash in a comment of ours; an agent may have written something else there.
pub(crate) fn comment_hash(comment: &str) -> Option<RuleHash> {
    tag(&Cow::Borrowed(comment)).as_deref().and_then(RuleHash::parse)
}

fn tag<'a>(comment: &Cow<'a, str>) -> Option<Cow<'a, str>> {
    let rest = match comment {
        Cow::Borrowed(text) => Cow::Borrowed(text.strip_prefix("cali:")?),
        Cow::Owned(text) => Cow::Owned(text.strip_prefix("cali:")?.to_owned()),
    };
    let plain = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    plain.then_some(rest)
}

/// Splits a rule into words the way the tools do: blanks separate, double quotes hold together, and a
/// backslash takes the next character as it is.
struct Words<'a>(&'a str);

impl<'a> Iterator for Words<'a> {
    type Item = Cow<'a, str>;

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.0.trim_start_matches(' ');
        if text.is_empty() {
            self.0 = text;
            return None;
        }
        let plain_end = text.find([' ', '"', '\\']).unwrap_or(text.len());
        let (plain, rest) = text.split_at(plain_end);
        if rest.is_empty() || rest.starts_with(' ') {
            self.0 = rest;
            return Some(Cow::Borrowed(plain));
        }
        let mut word = plain.to_owned();
        let mut quoted = false;
        let mut chars = rest.char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                '"' => quoted = !quoted,
                '\\' => word.extend(chars.next().map(|(_, escaped)| escaped)),
                ' ' if !quoted => {
                    self.0 = rest.get(at..).unwrap_or_default();
                    return Some(Cow::Owned(word));
                }
                other => word.push(other),
            }
        }
        self.0 = "";
        Some(Cow::Owned(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(text: &str) -> Option<RuleHash> {
        Some(RuleHash::parse(text).unwrap())
    }

    fn table(rules: &str) -> String {
        format!(
            "# Generated\n*filter\n:FORWARD ACCEPT [0:0]\n:cali-a - [0:0]\n:DOCKER - [0:0]\n{rules}COMMIT\n# Completed on today\n"
        )
    }

    #[test]
    fn our_chains_and_our_rules_are_told_from_others() {
        let output = table(
            "-A FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
             -A FORWARD -j DOCKER\n\
             -A FORWARD -m comment --comment \"cali:short\" -j ACCEPT\n\
             -A cali-a -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -m comment --comment \"x\" -j DROP\n\
             -A cali-a -j ACCEPT\n\
             -A DOCKER -j RETURN\n",
        );
        let view = parse(Table::Filter, &output).unwrap();
        assert_eq!(view.ours, BTreeMap::from([("cali-a".into(), vec![hash("AAAAAAAAAAAAAAAA"), None])]));
        let forward = vec![
            Entry::Ours {
                hash: hash("wUHhoiAYhphO9Mso"),
                rule: "-m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD".into(),
            },
            Entry::Foreign,
            Entry::Ours { hash: None, rule: "-m comment --comment \"cali:short\" -j ACCEPT".into() },
        ];
        assert_eq!(view.shared, BTreeMap::from([("FORWARD".into(), forward)]));
    }

    #[test]
    fn a_rule_is_ours_by_its_hash_comment_or_by_where_it_jumps() {
        let cases = [
            ("-j cali-FORWARD", true),
            ("--jump felix-FORWARD", true),
            ("-p tcp -j califw-x", true),
            ("-m comment --comment cali:AAAAAAAAAAAAAAAA -j X", true),
            ("-m comment --comment \"cali:AAAAAAAAAAAAAAAA\"", true),
            ("-m comment --comment \"cali:not a hash\" -j X", false),
            ("-m comment --comment \"see cali:AAAAAAAAAAAAAAAA\" -j X", false),
            ("-m comment --comment \"-j cali-FORWARD\" -j X", false),
            ("-m comment --comment -j -j X", false),
            ("-m comment --comment \"\\\"quoted\\\" -j cali-x\" -j X", false),
            ("-m comment --comment --jump cali-x", false),
            ("-j calico-dhcp-x", false),
            ("-j calico-FORWARD", false),
            ("-i cali-x -j ACCEPT", false),
            ("-j ACCEPT", false),
        ];
        for (rule, ours) in cases {
            let view = parse(Table::Filter, &table(&format!("-A FORWARD {rule}\n"))).unwrap();
            let entry = &view.shared["FORWARD"][0];
            assert_eq!(*entry != Entry::Foreign, ours, "{rule}");
        }
    }

    #[test]
    fn rules_of_the_first_agents_are_recognised_in_nat_only() {
        let tunnel =
            "-o tunl0 -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE";
        let pools = "-s 10.0.0.0/8 -m set ! --match-set felix-masq-ipam-pools dst -j MASQUERADE";
        for rule in [tunnel, pools] {
            let save = |table: &str| {
                format!("*{table}\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING {rule}\nCOMMIT\n# Completed on today\n")
            };
            let nat = parse(Table::Nat, &save("nat")).unwrap();
            assert_ne!(nat.shared["POSTROUTING"][0], Entry::Foreign, "{rule}");
            let mangle = parse(Table::Mangle, &save("mangle")).unwrap();
            assert_eq!(mangle.shared["POSTROUTING"][0], Entry::Foreign, "{rule}");
        }
    }

    #[test]
    fn an_incomplete_or_strange_output_is_an_error() {
        let cases = [
            ("cut before COMMIT", "*filter\n:FORWARD ACCEPT [0:0]\n", 2),
            ("cut inside a line", "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n# Completed on to", 4),
            ("cut inside the completion", "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n# Comp", 4),
            ("cut after COMMIT", "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n", 3),
            ("completed without COMMIT", "*filter\n:FORWARD ACCEPT [0:0]\n# Completed on today\n", 3),
            ("nothing", "", 0),
            ("a warning only", "# Warning: iptables-legacy tables present, use iptables-legacy-save to see them\n", 1),
            ("cut inside COMMIT", "*filter\n:FORWARD ACCEPT [0:0]\nCOM", 3),
            ("another table", "*nat\nCOMMIT\n", 1),
            ("twice the table", "*filter\nCOMMIT\n*filter\nCOMMIT\n", 3),
            ("no table", ":FORWARD ACCEPT [0:0]\n", 1),
            ("rule after the end", "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n-A FORWARD -j DROP\n", 4),
            ("undeclared chain", "*filter\n-A FORWARD -j DROP\nCOMMIT\n", 2),
            ("unrepresentable", "# Table `filter' is incompatible, use 'nft' tool.\n", 1),
        ];
        for (what, output, line) in cases {
            assert_eq!(parse(Table::Filter, output).unwrap_err().line, line, "{what}");
        }
    }

    /// The rows of U6.e, as iptables 1.8.9 printed them, and what a killed program leaves.
    #[test]
    fn a_listing_is_judged_by_its_header_commit_and_completion() {
        let generated = "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Sat Nov 21 19:00:09 2026\n";
        let body = "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n";
        let completed = "# Completed on Sat Nov 21 19:00:09 2026\n";
        let hidden = "# Table `nat' contains incompatible base-chains, use 'nft' tool to list them.\n";
        let complete = |hides_base_chains| Judgement::Complete { hides_base_chains };
        let cases = [
            (format!("{generated}{body}{completed}"), complete(false)),
            (format!("{hidden}{generated}{body}{completed}"), complete(true)),
            (format!("{generated}{hidden}{body}{completed}"), complete(true)),
            ("# Table `nat' is incompatible, use 'nft' tool.\n".to_owned(), Judgement::Incompatible),
            (format!("{generated}{body}"), Judgement::CutOff),
            (format!("{generated}{}{completed}", body.replace("COMMIT\n", "")), Judgement::CutOff),
            (format!("{generated}{}{completed}", body.replace("*nat", "*raw")), Judgement::CutOff),
            (format!("{generated}{body}{}", completed.trim_end()), Judgement::CutOff),
            (generated.to_owned(), Judgement::CutOff),
            (String::new(), Judgement::CutOff),
        ];
        for (output, expected) in cases {
            assert_eq!(judge(Table::Nat, &output), expected, "{output}");
            assert_eq!(parse(Table::Nat, &output).is_ok(), matches!(expected, Judgement::Complete { .. }), "{output}");
        }
    }

    #[test]
    fn words_are_split_as_the_tools_do() {
        let words = |text| Words(text).map(Cow::into_owned).collect::<Vec<_>>();
        assert_eq!(
            words("-m comment  --comment \"a \\\"b\\\" c\" -j X"),
            ["-m", "comment", "--comment", "a \"b\" c", "-j", "X"]
        );
        assert_eq!(words("a\"b c\"d e"), ["ab cd", "e"]);
        assert_eq!(words("open \"quote x"), ["open", "quote x"]);
        assert_eq!(words("é \"ü ö\""), ["é", "ü ö"]);
        assert_eq!(words("  "), Vec::<String>::new());
    }
}
