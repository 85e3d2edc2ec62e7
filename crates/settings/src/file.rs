//! Reads the dialect of INI that `felix.cfg` is written in (operations.md 2.4).
//!
//! Fed by the agent with the text of the file, feeds [`crate::Raw`]. Sections mean nothing: the
//! keys of all of them are merged, a later section beats an earlier one.

use std::collections::BTreeMap;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Keys as spelled and raw values, each parameter once, in the order in which they took effect.
    pub pairs: Vec<(String, String)>,
    /// Keys that were set more than once, in two sections or in two spellings; the last one counts.
    pub repeated: Vec<String>,
}

/// Why the file cannot be read as a whole. No message repeats the text of the line, which may hold
/// a credential (I12).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct FileError {
    /// Counts from 1.
    pub line: usize,
    pub reason: &'static str,
}

/// Starts and ends a value that is taken literally, over several lines if need be.
const LITERAL_MARKS: [&str; 2] = ["\"\"\"", "`"];

/// Parses the text of a file.
///
/// # Errors
///
/// The first line that has no meaning (rules 1 and 2); nothing of such a file counts.
pub fn parse(text: &str) -> Result<Contents, FileError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines = Lines { rest: text.lines(), number: 0 };
    let mut sections = Sections::default();
    let mut section = "DEFAULT".to_owned();
    while let Some(line) = lines.next() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let (name, _) = header.rsplit_once(']').ok_or(lines.error("a section header without `]`"))?;
            name.trim().clone_into(&mut section);
            continue;
        }
        let (key, rest) = line.split_once(['=', ':']).ok_or(lines.error("neither `=` nor `:` after a key"))?;
        let key = key.trim();
        if key.is_empty() {
            return Err(lines.error("no key before the `=` or `:`"));
        }
        let value = value(rest.trim_start(), &mut lines)?;
        sections.set(&section, key, value);
    }
    Ok(sections.flatten())
}

/// Reads the value that starts with this text, and with it the lines that it goes on in.
fn value(text: &str, lines: &mut Lines<'_>) -> Result<String, FileError> {
    for mark in LITERAL_MARKS {
        if let Some(rest) = text.strip_prefix(mark) {
            return literal(rest, mark, lines);
        }
    }
    let text = text.trim();
    if let Some(start) = text.strip_suffix('\\') {
        return Ok(continued(start, lines));
    }
    let text = text.split(['#', ';']).next().unwrap_or_default().trim();
    Ok(unquote(text).to_owned())
}

/// Rule 4: everything up to the last mark on the line where there is one.
fn literal(start: &str, mark: &str, lines: &mut Lines<'_>) -> Result<String, FileError> {
    let unclosed = lines.error("the value that starts here is not closed");
    if let Some((value, _)) = start.rsplit_once(mark) {
        return Ok(value.to_owned());
    }
    let mut value = start.to_owned();
    for line in lines {
        value.push('\n');
        if let Some((last, _)) = line.rsplit_once(mark) {
            value.push_str(last);
            return Ok(value);
        }
        value.push_str(line);
    }
    Err(unclosed)
}

/// Rule 6: the next line, trimmed, follows without a blank; comments and quotes mean nothing.
fn continued(start: &str, lines: &mut Lines<'_>) -> String {
    let mut value = start.to_owned();
    for line in lines {
        let line = line.trim();
        match line.strip_suffix('\\') {
            Some(more) => value.push_str(more),
            None => {
                value.push_str(line);
                break;
            }
        }
    }
    value
}

/// Rule 5: drops one pair of quotes round a value that has no other quote of that kind.
fn unquote(text: &str) -> &str {
    for quote in ['"', '\''] {
        let inside = text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
        if let Some(inside) = inside.filter(|inside| !inside.contains(quote)) {
            return inside;
        }
    }
    text
}

/// The lines that are left, with the number of the last one taken.
struct Lines<'a> {
    rest: std::str::Lines<'a>,
    number: usize,
}

impl Lines<'_> {
    const fn error(&self, reason: &'static str) -> FileError {
        FileError { line: self.number, reason }
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        self.number += 1;
        self.rest.next()
    }
}

/// Sections in the order in which they first appeared; a section that appears again goes on.
#[derive(Default)]
struct Sections {
    names: Vec<String>,
    keys: Vec<Vec<(String, String)>>,
}

impl Sections {
    fn set(&mut self, section: &str, key: &str, value: String) {
        let index = self.names.iter().position(|name| name == section).unwrap_or_else(|| {
            self.names.push(section.to_owned());
            self.keys.push(Vec::new());
            self.names.len() - 1
        });
        if let Some(keys) = self.keys.get_mut(index) {
            // The same spelling again within one section is a silent replacement (rule 8).
            keys.retain(|(known, _)| known != key);
            keys.push((key.to_owned(), value));
        }
    }

    fn flatten(self) -> Contents {
        let mut last: BTreeMap<String, (String, String)> = BTreeMap::new();
        let mut order = Vec::new();
        let mut contents = Contents::default();
        for (key, value) in self.keys.into_iter().flatten() {
            let lower = key.to_ascii_lowercase();
            if last.insert(lower.clone(), (key.clone(), value)).is_some() {
                order.retain(|known| known != &lower);
                contents.repeated.push(key);
            }
            order.push(lower);
        }
        contents.pairs = order.into_iter().filter_map(|lower| last.remove(&lower)).collect();
        contents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rule of operations.md 2.4, text, the pairs it gives or what the error says.
    #[allow(clippy::type_complexity, reason = "rows of a table")]
    const CASES: &[(&str, &str, Result<&[(&str, &str)], &str>)] = &[
        ("1", "a = 1\n[x]\nb = 2\n[ y ] trailing\nc=3", Ok(&[("a", "1"), ("b", "2"), ("c", "3")])),
        ("1", "a = 1\n[x\n", Err("line 2: a section header without `]`")),
        ("2", "a: 1\nb = x:y\nc : d=e", Ok(&[("a", "1"), ("b", "x:y"), ("c", "d=e")])),
        ("2", "a = 1\n\nfoo\n", Err("line 3: neither `=` nor `:` after a key")),
        ("2", "= 1", Err("line 1: no key")),
        (
            "3",
            "# c\n; c\n  # c = 1\nLogPrefix = a;b\nURL=http://x/#frag\nd = append # hash",
            Ok(&[("LogPrefix", "a"), ("URL", "http://x/"), ("d", "append")]),
        ),
        ("4", "a = `x#y;z` rest\nb = \"\"\"p\"q\"\"\"", Ok(&[("a", "x#y;z"), ("b", "p\"q")])),
        ("4", "a = `one\ntwo # kept\nthree` rest\nb=1", Ok(&[("a", "one\ntwo # kept\nthree"), ("b", "1")])),
        ("4", "x = 1\na = `one\ntwo", Err("line 2: the value that starts here is not closed")),
        (
            "5",
            "a = \"x y\"\nb = 'x'\nc = \"x\"y\"\nd = \"#x\"\ne = '\"'",
            Ok(&[("a", "x y"), ("b", "x"), ("c", "\"x\"y\""), ("d", "\""), ("e", "\"")]),
        ),
        ("6", "a = one, \\\n   two;x \\\n  three # kept\nb = 1", Ok(&[("a", "one, two;x three # kept"), ("b", "1")])),
        ("6", "a = one\\", Ok(&[("a", "one")])),
        ("7", "\u{feff}  a   =   1  \nb =\n", Ok(&[("a", "1"), ("b", "")])),
        ("8", "a = 1\na = 2", Ok(&[("a", "2")])),
        ("9", "a = %(b)s\nb = 1", Ok(&[("a", "%(b)s"), ("b", "1")])),
        ("crlf", "[global]\r\na = 1\r\nb = x \\\r\n y\r\n", Ok(&[("a", "1"), ("b", "x y")])),
        ("empty", "", Ok(&[])),
    ];

    #[test]
    fn the_rules_of_the_dialect_hold() {
        for (rule, text, expected) in CASES {
            match (parse(text), expected) {
                (Ok(contents), Ok(expected)) => {
                    let pairs: Vec<_> =
                        contents.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
                    assert_eq!(&pairs, expected, "rule {rule}: {text:?}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "rule {rule}: {error}"),
                (got, expected) => panic!("rule {rule}: got {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn a_repeated_key_is_reported_across_sections_and_spellings_only() {
        let repeated = |text| parse(text).unwrap().repeated;
        assert!(repeated("a = 1\na = 2").is_empty());
        assert_eq!(repeated("[x]\na = 1\n[y]\na = 2"), ["a"]);
        assert_eq!(repeated("a = 1\nA = 2"), ["A"]);
    }

    #[test]
    fn sections_win_in_the_order_in_which_they_first_appear() {
        let contents = parse("[a]\nk = 1\n[b]\nK = 2\n[a]\nk = 3").unwrap();
        assert_eq!(contents.pairs, [("K".to_owned(), "2".to_owned())]);
    }

    #[test]
    fn an_error_never_repeats_the_line() {
        let error = parse("EtcdPassword hunter2").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
