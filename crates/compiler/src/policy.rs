//! Chains of policies and profiles (netfilter.md 10).
//!
//! Fed with the graph's rule programs, feeds the table programs of [`crate::uses`]. A rule goes through
//! three forms: `Shape` is the rule of one family with everything that the kernel would refuse taken
//! out (`shape`), the match blocks are what does not fit in one rule (`blocks`), and the rest becomes
//! the main rule and its action rules (here).
//!
//! Invariants: an allow, pass or log rule that cannot be written exactly is left out, a deny rule is
//! written so that it denies at least as much; either is reported. Every rule carries its origin.
//! Nothing here depends on other policies or on history.

mod blocks;
mod shape;
#[cfg(test)]
mod tests;

use graph::RuleProgram;
use model::{Action as Verdict, Family, Name, PolicyKey};
use program::{Action, Chain, ChainName, Direction, Match, Origin, Rule, SetName, Table};

use crate::Complaint;
use crate::names;
use crate::options::Options;
use shape::Shape;
pub(crate) use shape::split_ports;

/// The policy or profile that rules belong to.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    Policy { key: &'a PolicyKey, tier: &'a str, untracked: bool },
    Profile { name: &'a Name },
}

/// What rendering needs to know besides the rules.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub options: &'a Options,
    pub owner: Owner<'a>,
    pub direction: Direction,
    pub family: Family,
    pub table: Table,
    /// The kernel name of a set that exists; a rule that names one that does not would stop the whole table.
    pub set_name: &'a dyn Fn(&model::SetId, Family) -> Option<SetName>,
}

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { options: _, owner, direction, family, table, set_name: _ } = self;
        write!(f, "{owner:?} {direction:?} {family} {table:?}")
    }
}

/// Returns the chain of one direction of a policy or profile (10.6).
pub fn chain(context: &Context<'_>, rules: &[RuleProgram], complaints: &mut Vec<Complaint>) -> Chain {
    let mut rendered = Vec::with_capacity(rules.len() * 2);
    let mut pass_may_be_set = context.owner.is_profile();
    for rule in rules {
        if pass_may_be_set && rule.action == Verdict::Pass {
            // A pass of a tier or of an earlier profile is still marked; it must not look like one of
            // this profile (policy.md ).
            let at = rendered.len();
            append_rule(context, rule, &mut rendered, complaints);
            if rendered.len() > at {
                rendered.insert(at, Rule::new(Vec::new(), Action::ClearMark(context.options.marks.pass)));
                pass_may_be_set = false;
            }
        } else {
            append_rule(context, rule, &mut rendered, complaints);
        }
    }
    while rendered.last().is_some_and(|rule| rule.action == Some(Action::Return)) {
        rendered.pop();
    }
    if rendered.is_empty() {
        rendered.push(Rule::default());
    }
    if let Some(first) = rendered.first_mut() {
        first.comments.push(context.comment());
    }
    Chain { name: context.chain_name(), rules: rendered }
}

/// Returns the rules that one stored rule becomes in one family, without the chain's comment.
pub fn rule(context: &Context<'_>, rule: &RuleProgram, complaints: &mut Vec<Complaint>) -> Vec<Rule> {
    let mut rendered = Vec::new();
    append_rule(context, rule, &mut rendered, complaints);
    rendered
}

fn append_rule(context: &Context<'_>, rule: &RuleProgram, out: &mut Vec<Rule>, complaints: &mut Vec<Complaint>) {
    let mut defects = Vec::new();
    let shape = Shape::of(rule, context.family, context.set_name, &mut defects);
    if !defects.is_empty() {
        complaints.push(context.complaint(rule, &defects));
    }
    let Some(shape) = shape else { return };
    let at = out.len();
    let scratch_is_used = blocks::append(&shape, &context.options.marks, out);
    let mut matches = shape.into_matches(context.family);
    if scratch_is_used {
        let mark = context.options.marks.scratch0;
        matches.push(Match::MarkIs { value: mark, mask: mark });
    }
    append_actions(context, rule, matches, out);
    for rendered in out.iter_mut().skip(at) {
        rendered.origin = Some(context.origin(rule.index));
        rendered.comments.extend(rule.annotations.iter().map(|(key, value)| format!("{key}={value}")));
    }
}

/// The main rule sets a bit, further rules act on it (10.5).
fn append_actions(context: &Context<'_>, rule: &RuleProgram, mut matches: Vec<Match>, out: &mut Vec<Rule>) {
    let Options { marks, log_rate, log_burst, .. } = context.options;
    let (mark, letter, verdict) = match rule.action {
        Verdict::Allow => (marks.accept, 'A', Action::Return),
        Verdict::Pass => (marks.pass, 'P', Action::Return),
        Verdict::Deny => (marks.drop, 'D', context.options.deny(context.table)),
        Verdict::Log => {
            if let Some(rate) = *log_rate {
                matches.insert(0, Match::Limit { rate, burst: *log_burst });
            }
            out.push(Rule::new(matches, Action::Log { prefix: context.log_prefix() }));
            return;
        }
    };
    let marked = || vec![Match::MarkIs { value: mark, mask: mark }];
    out.push(Rule::new(matches, Action::SetMark(mark)));
    if context.options.flow_logs && !context.owner.is_untracked() {
        out.push(Rule::new(marked(), context.flow_log(letter, rule.index)));
    }
    out.push(Rule::new(marked(), verdict));
}

impl Owner<'_> {
    fn is_profile(&self) -> bool {
        matches!(self, Self::Profile { .. })
    }

    fn is_untracked(&self) -> bool {
        matches!(self, Self::Policy { untracked: true, .. })
    }
}

impl Context<'_> {
    fn chain_name(&self) -> ChainName {
        match self.owner {
            Owner::Policy { key, .. } => names::policy_chain(key, self.direction),
            Owner::Profile { name } => names::profile_chain(name, self.direction),
        }
    }

    fn comment(&self) -> String {
        let direction = direction_word(self.direction);
        match self.owner {
            Owner::Policy { key, .. } if key.namespace.is_empty() => {
                format!("{} {} {direction}", key.kind.as_str(), key.name)
            }
            Owner::Policy { key, .. } => {
                format!("{} {}/{} {direction}", key.kind.as_str(), key.namespace, key.name)
            }
            Owner::Profile { name } => format!("Profile {name} {direction}"),
        }
    }

    fn origin(&self, index: u32) -> Origin {
        let direction = self.direction;
        match self.owner {
            Owner::Policy { key, .. } => Origin::Policy { key: key.clone(), direction, index },
            Owner::Profile { name } => Origin::Profile { name: Name::clone(name), direction, index },
        }
    }

    fn flow_log(&self, letter: char, index: u32) -> Action {
        let (group, way) = flow_log_group(self.direction);
        let prefix = match self.owner {
            Owner::Policy { key, .. } => format!("{letter}P{way}{index}|{key}"),
            Owner::Profile { name } => format!("{letter}R{way}{index}|{name}"),
        };
        Action::NfLog { group, prefix: names::flow_log_prefix(&prefix) }
    }

    /// The operator's prefix with its `%` words replaced (12.2).
    fn log_prefix(&self) -> String {
        let configured = match self.options.log_prefix.as_str() {
            "" => "calico-packet",
            configured => configured,
        };
        let (kind, namespace, name, tier) = match self.owner {
            Owner::Policy { key, tier, .. } => (key.kind.short(), key.namespace.as_ref(), key.name.as_ref(), tier),
            Owner::Profile { name } => ("pro", "", name.as_ref(), ""),
        };
        let mut prefix = String::with_capacity(configured.len() + 32);
        let mut rest = configured.chars().peekable();
        while let Some(c) = rest.next() {
            let known = matches!((c, rest.peek()), ('%', Some('k' | 'n' | 'p' | 't')));
            match if known { rest.next() } else { None } {
                Some('k') => prefix.push_str(kind),
                Some('n') => prefix.push_str(name),
                Some('t') => prefix.push_str(tier),
                Some(_) if namespace.is_empty() => prefix.push_str(name),
                Some(_) => {
                    prefix.push_str(namespace);
                    prefix.push('/');
                    prefix.push_str(name);
                }
                None => prefix.push(c),
            }
        }
        prefix
    }

    fn complaint(&self, rule: &RuleProgram, defects: &[String]) -> Complaint {
        let outcome = match rule.action {
            Verdict::Deny => "it denies without what is wrong, that is, more",
            Verdict::Allow | Verdict::Pass | Verdict::Log => "it is left out",
        };
        Complaint {
            object: match self.owner {
                Owner::Policy { key, .. } => key.to_string(),
                Owner::Profile { name } => format!("profile {name}"),
            },
            reason: format!(
                "{} rule {} cannot be programmed, {outcome}: {}",
                direction_word(self.direction),
                rule.index,
                defects.join(", ")
            ),
        }
    }
}

/// The word of comments.
pub(crate) const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// NFLOG group and the letter of the prefix (12.1).
pub(crate) const fn flow_log_group(direction: Direction) -> (u16, char) {
    match direction {
        Direction::Ingress => (1, 'I'),
        Direction::Egress => (2, 'E'),
    }
}

/// Returns the stand-in of a chain that a rule refers to and nobody defines: it drops everything.
pub fn closed_chain(name: ChainName) -> Chain {
    let rule = Rule::new(Vec::new(), Action::Drop).comment("Not known, drop");
    Chain { name, rules: vec![rule] }
}
