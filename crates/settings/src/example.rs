//! Writes the example of a configuration file from the table.
//!
//! The result is kept as `config/felix.cfg.example`; a test holds the two together.

use crate::params::{GROUPS, Param};

/// Longest line of the example.
const WIDTH: usize = 100;

/// The text of the example: every effective parameter with its default, commented out.
pub fn text() -> String {
    let mut out = String::new();
    comment(
        &mut out,
        "Configuration of calico-felix; copy it to /etc/calico/felix.cfg. Every parameter can also be set in the \
         environment, as FELIX_ and its name in upper case, which beats this file; most can be set for all hosts \
         or one host by a FelixConfiguration, which this file beats. `none` is the empty value of any kind. \
         A `#` or `;` ends a value.",
    );
    out.push_str("\n[global]\n");
    for group in GROUPS {
        let effective: Vec<&Param> = group.params.iter().filter(|param| param.is_effective()).collect();
        if effective.is_empty() {
            continue;
        }
        out.push_str(&format!("\n#\n# {}\n#\n", group.title));
        for param in effective {
            out.push('\n');
            let local = if param.local { " Only here or in the environment." } else { "" };
            comment(&mut out, &format!("{} Accepts {}.{local}", param.doc, param.kind.describe()));
            out.push_str(format!("#{} = {}", param.name, param.default).trim_end());
            out.push('\n');
        }
    }
    out
}

/// Writes words as comment lines of at most [`WIDTH`] characters.
fn comment(out: &mut String, words: &str) {
    let mut line = "#".to_owned();
    for word in words.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = "#".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}
