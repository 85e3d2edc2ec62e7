//! The text of one rule, in the form in which the save programs show it.

use std::borrow::Cow;
use std::fmt::Write as _;

use dataplane::iptables::parse::is_our_chain;

/// A rule as a table holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What follows the chain's name.
    pub text: Box<str>,
    /// The chain or action that it jumps or goes to.
    pub target: Option<Box<str>>,
    /// Sets that it looks into.
    pub sets: Vec<Box<str>>,
    /// What follows `cali:` in its first comment that begins so.
    pub hash: Option<Box<str>>,
    /// The kernel would not have it.
    pub is_bad: bool,
    /// It asks for a type of ICMP.
    pub is_icmp: bool,
}

impl Line {
    /// Reads a rule without the chain's name.
    pub fn parse(text: &str) -> Self {
        let words: Vec<Cow<'_, str>> = Words(text).collect();
        let mut head: [Option<String>; 5] = [const { None }; 5];
        let mut tail = String::with_capacity(text.len());
        let (mut target, mut sets, mut hash) = (None, Vec::new(), None);
        let mut protocol = None;
        let mut icmp = false;
        let mut at = 0;
        while let Some(word) = words.get(at) {
            let negated = word == "!";
            let option = words.get(at + usize::from(negated)).map(AsRef::as_ref).unwrap_or_default();
            let value_at = at + usize::from(negated) + 1;
            let value = words.get(value_at).map(AsRef::as_ref).unwrap_or_default();
            let slot = match option {
                "-s" | "--source" => Some((0, "-s")),
                "-d" | "--destination" => Some((1, "-d")),
                "-i" | "--in-interface" => Some((2, "-i")),
                "-o" | "--out-interface" => Some((3, "-o")),
                "-p" | "--protocol" => Some((4, "-p")),
                _ => None,
            };
            if let Some((slot, name)) = slot {
                let shown = match slot {
                    0 | 1 => full_net(value),
                    4 => protocol_name(value).to_owned(),
                    _ => value.to_owned(),
                };
                if slot == 4 && !negated {
                    protocol = Some(shown.clone());
                }
                head[slot] = Some(format!("{}{name} {shown}", if negated { "! " } else { "" }));
                at = value_at + 1;
                continue;
            }
            icmp |= option == "--icmp-type";
            let is_comment = option == "--comment";
            match option {
                "-j" | "--jump" | "-g" | "--goto" => {
                    target = Some(value.into());
                    push(&mut tail, if option == "-j" || option == "--jump" { "-j" } else { "-g" });
                    push(&mut tail, value);
                    at = value_at + 1;
                    continue;
                }
                "--match-set" => sets.push(value.into()),
                "--comment" if hash.is_none() => hash = value.strip_prefix("cali:").map(Box::from),
                _ => {}
            }
            if negated {
                push(&mut tail, "!");
            }
            push(&mut tail, &quoted(option));
            if is_comment || option == "--match-set" {
                // A value is no option, whatever it says.
                push(&mut tail, &quoted(value));
                at = value_at + 1;
            } else {
                at = value_at;
            }
        }
        let mut text = String::with_capacity(tail.len() + 32);
        for part in head.iter().flatten() {
            push(&mut text, part);
        }
        if !tail.is_empty() {
            push(&mut text, &tail);
        }
        let is_bad = icmp && protocol.as_deref() != Some("icmp");
        Self { text: text.into(), target, sets, hash, is_bad, is_icmp: icmp }
    }

    /// Returns whether an agent of ours made it.
    pub fn is_ours(&self) -> bool {
        self.hash.is_some() || self.target.as_deref().is_some_and(is_our_chain)
    }

    /// Returns whether it is for all packets: nothing but comments and an action.
    pub fn is_bare(&self) -> bool {
        let mut words = Words(&self.text);
        loop {
            match words.next().as_deref() {
                Some("-m") if words.next().as_deref() == Some("comment") => {
                    words.next();
                    words.next();
                }
                Some("-j") => return words.count() == 1,
                _ => return false,
            }
        }
    }
}

fn push(out: &mut String, word: &str) {
    if !out.is_empty() {
        out.push(' ');
    }
    out.push_str(word);
}

fn quoted(word: &str) -> Cow<'_, str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-!,./<>=+&|:~@%#'".contains(&b);
    // The tools quote what is not in their list of plain characters; a colon is not in it.
    if !word.is_empty() && word.bytes().all(|b| plain(b) && (b != b':' || !word.starts_with("cali:"))) {
        return Cow::Borrowed(word);
    }
    let mut text = String::with_capacity(word.len() + 2);
    text.push('"');
    for char in word.chars() {
        if matches!(char, '"' | '\\') {
            text.push('\\');
        }
        text.push(char);
    }
    text.push('"');
    Cow::Owned(text)
}

fn full_net(value: &str) -> String {
    let mut text = value.to_owned();
    if !value.contains('/') {
        let length = if value.contains(':') { 128 } else { 32 };
        write!(text, "/{length}").ok();
    }
    text
}

fn protocol_name(value: &str) -> &str {
    match value {
        "6" => "tcp",
        "17" => "udp",
        "1" => "icmp",
        "58" | "icmpv6" => "ipv6-icmp",
        "132" => "sctp",
        other => other,
    }
}

/// Splits text into words as the tools do.
pub(super) struct Words<'a>(pub(super) &'a str);

impl<'a> Iterator for Words<'a> {
    type Item = Cow<'a, str>;

    fn next(&mut self) -> Option<Cow<'a, str>> {
        let text = self.0.trim_start_matches(' ');
        if text.is_empty() {
            self.0 = text;
            return None;
        }
        let plain = text.find([' ', '"', '\\']).unwrap_or(text.len());
        if !text[plain..].starts_with(['"', '\\']) {
            self.0 = &text[plain..];
            return Some(Cow::Borrowed(&text[..plain]));
        }
        let mut word = text[..plain].to_owned();
        let mut chars = text[plain..].char_indices();
        let mut open = false;
        while let Some((at, char)) = chars.next() {
            match char {
                '"' => open = !open,
                '\\' => word.extend(chars.next().map(|(_, next)| next)),
                ' ' if !open => {
                    self.0 = &text[plain + at..];
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

    #[test]
    fn a_rule_is_shown_as_the_save_programs_show_it() {
        for (given, shown) in [
            ("--jump DROP", "-j DROP"),
            (
                "-m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -p 6 -s 10.0.0.1 -m set --match-set s1 src --jump DROP",
                "-s 10.0.0.1/32 -p tcp -m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -m set --match-set s1 src -j DROP",
            ),
            ("-m comment --comment \"-j cali-x\" --goto y", "-m comment --comment \"-j cali-x\" -g y"),
            ("! -i cali1 -j X", "! -i cali1 -j X"),
        ] {
            assert_eq!(&*Line::parse(given).text, shown);
            assert_eq!(&*Line::parse(shown).text, shown, "shown again");
        }
    }

    #[test]
    fn what_a_rule_refers_to_is_found() {
        let line =
            Line::parse("-m comment --comment \"cali:h\" -m set ! --match-set s1 src -m set --match-set s2 dst -j t");
        assert_eq!(line.sets, ["s1".into(), "s2".into()]);
        assert_eq!((line.target.as_deref(), line.hash.as_deref()), (Some("t"), Some("h")));
    }
}
