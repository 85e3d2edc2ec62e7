//! Parameters from environment variables (operations.md 2.3).
//!
//! Fed by the agent with the variables of the process, feeds [`crate::Raw`].

use std::collections::BTreeMap;

/// Start of the names that count, in any letter case.
const PREFIX: &str = "FELIX_";

/// What the environment says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Parameter names in lower case and raw values, in the order of the environment.
    pub pairs: Vec<(String, String)>,
    /// Parameters that more than one variable sets; the last one counts.
    pub repeated: Vec<String>,
}

/// Picks the variables that set parameters.
pub fn read(variables: impl IntoIterator<Item = (String, String)>) -> Environment {
    let mut found = Environment::default();
    let mut position = BTreeMap::new();
    for (variable, value) in variables {
        let Some((head, name)) = variable.split_at_checked(PREFIX.len()) else { continue };
        if !head.eq_ignore_ascii_case(PREFIX) || name.is_empty() {
            continue;
        }
        let name = name.to_ascii_lowercase();
        match position.get(&name).and_then(|index: &usize| found.pairs.get_mut(*index)) {
            Some(pair) => {
                pair.1 = value;
                if !found.repeated.contains(&name) {
                    found.repeated.push(name);
                }
            }
            None => {
                position.insert(name.clone(), found.pairs.len());
                found.pairs.push((name, value));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_and_name_are_free_in_letter_case_and_the_last_variable_wins() {
        let variables = [
            ("felix_ipv6support", "False"),
            ("FELIX_", "x"),
            ("FELI", "x"),
            ("FELIXÄ_", "x"),
            ("PATH", "/bin"),
            ("FELIX_LogPrefix", "a=b"),
            ("Felix_IPV6SUPPORT", "true"),
        ];
        let found = read(variables.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let pairs: Vec<_> = found.pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("ipv6support", "true"), ("logprefix", "a=b")]);
        assert_eq!(found.repeated, ["ipv6support"]);
    }
}
