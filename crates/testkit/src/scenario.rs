//! Scenarios: named datastore states as text, with the output that each must lead to, and the
//! expanders that make more scenarios of each.
//!
//! ```text
//! //- state both groups
//! wep h1/openstack/vm1/eth0  ip=10.65.0.2 label=sg-web interface=tap1
//! wep h2/openstack/vm2/eth0  ip=10.65.0.9 label=sg-db
//! policy np/openstack/ossg.default.web  order=10 selector has(sg-web)
//!   ingress allow tcp from has(sg-db) to-ports 5432
//! //- expect
//! set has(sg-db): 10.65.0.9/32
//! policy np/openstack/ossg.default.web
//! endpoint tap1: h1/openstack/vm1/eth0 | default deny in np/openstack/ossg.default.web out np/openstack/ossg.default.web
//! //- state the database moves
//! wep h2/openstack/vm2/eth0  ip=10.65.0.11 label=sg-db
//! //- expect
//! set has(sg-db): 10.65.0.11/32
//! ```
//!
//! A state and its expectation start from those before; a line replaces the one for the same object,
//! `gone <start of line>` takes it away, `//- state <name> (from nothing)` starts afresh. The first
//! line of a file may be `host <name>`; the default is `h1`. `#` begins a comment line.
//!
//! Lines of a state: `wep`, `policy`, `tier <name> order=1 pass`, `rules <profile>` (with `ingress` and
//! `egress` lines as for policies), `labels <profile> a=1,b`, `netset <key> a=1 10.0.0.0/8 …`,
//! `hep <name> <host> ip=192.0.2.1 …`, `link <name> <index> up|down`.
//! Lines of an expectation: `set <selector>: members`, `ports <name>/<protocol> of <selector>: members`,
//! `service <namespace/name>`, `service-addresses <namespace/name>`, `policy <key>`,
//! `profile <name> [missing]`, `endpoint <interface>: <key> | tier | tier …`, `hep <name>: <interface>`, for each of
//! its lists that is not empty `hep <name> untracked|pre-dnat|normal|forward: tier | tier …`,
//! `link <name> <index> up|down`.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "for tests")]

use std::collections::{BTreeMap, BTreeSet};

use graph::{HostTiers, SetMember, TierProgram};
use model::update::UpdateKey;
use model::{SetId, Update};

use crate::build;
use crate::naive::Facts;
use crate::replay::Known;
use crate::world::Dice;

/// A sequence of states, and how to go from one to the next. See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: String,
    pub host: String,
    pub states: Vec<State>,
    pub cut: Cut,
    pub keys: KeyOrder,
}

/// Where batches end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// After each state.
    States,
    /// Only after the last state.
    Squashed,
    /// After each object.
    Objects,
    /// After each object, and an object that changes goes in one batch and comes back in the next.
    Replaced,
}

/// In which order the objects of a state change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOrder {
    Forward,
    Reverse,
    Shuffled,
}

/// A batch of a scenario.
#[derive(Clone, Debug)]
pub struct Stop<'a> {
    /// For messages.
    pub place: String,
    pub updates: Vec<Update>,
    /// What is in the datastore afterwards.
    pub facts: Facts,
    /// The state that has been reached, if this is one and says what is expected.
    pub state: Option<&'a State>,
    /// The updates say nothing new.
    pub is_quiet: bool,
}

/// What is in the datastore, and what must then be known.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub name: String,
    pub facts: Facts,
    /// Lines by what they are about, which is their text up to the colon. `None` if nobody has written
    /// down what to expect.
    pub expected: Option<BTreeMap<String, String>>,
}

impl Scenario {
    /// Reads a scenario file.
    pub fn parse(name: &str, text: &str) -> Self {
        let mut host = "h1".to_owned();
        let mut states: Vec<State> = Vec::new();
        let mut expecting = false;
        let mut lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).peekable();
        while let Some(line) = lines.next() {
            if let Some(title) = line.strip_prefix("//- state ") {
                expecting = false;
                let (title, afresh) =
                    title.strip_suffix(" (from nothing)").map_or((title, false), |title| (title, true));
                let before = states.last().filter(|_| !afresh).cloned().unwrap_or_else(State::empty);
                states.push(State { name: title.to_owned(), ..before });
                continue;
            }
            if line == "//- expect" {
                expecting = true;
                continue;
            }
            if let Some(name) = line.strip_prefix("host ") {
                host = name.to_owned();
                continue;
            }
            let state = states.last_mut().unwrap_or_else(|| panic!("{name}: a line before the first state: {line}"));
            let gone = line.strip_prefix("gone ");
            if expecting {
                let line = gone.unwrap_or(line).to_owned();
                let subject = subject(&line);
                let expected = state.expected.get_or_insert_default();
                if gone.is_some() {
                    expected.remove(&subject).unwrap_or_else(|| panic!("{name}: nothing expected of {subject:?}"));
                } else {
                    expected.insert(subject, line);
                }
                continue;
            }
            let mut more = Vec::new();
            while let Some(indented) = lines.next_if(|line| line.starts_with("  ")) {
                more.push(indented.trim());
            }
            let fact = fact(gone.unwrap_or(line), &more);
            if gone.is_some() {
                let key = fact.key();
                state.facts.remove(&key).unwrap_or_else(|| panic!("{name}: not there: {line}"));
            } else {
                state.facts.insert(fact.key(), fact);
            }
        }
        Self { name: name.to_owned(), host, states, cut: Cut::States, keys: KeyOrder::Forward }
    }

    /// The scenario itself, and what it expands to: its states in other sequences, most of which are not
    /// the same backwards, each of them with batches cut in every way and keys in every order.
    pub fn expand(&self) -> Vec<Self> {
        let named =
            |what: &str, states: Vec<State>| Self { name: format!("{} ({what})", self.name), states, ..self.clone() };
        let n = self.states.len();
        let reversed: Vec<State> = self.states.iter().rev().cloned().collect();
        let spaced = |states: &[State]| states.iter().flat_map(|state| [state.clone(), State::empty()]).collect();
        let rotated = |by: usize| self.states.iter().cycle().skip(by).take(n + by).cloned().collect();
        // From the first state to every other and back.
        let star = self.states.iter().skip(1).flat_map(|state| [state, &self.states[0]]).cloned().collect();
        let mut sequences = vec![
            self.clone(),
            named("empty states between", spaced(&self.states)),
            named("states in reverse", reversed.clone()),
            named("states in reverse, empty states between", spaced(&reversed)),
            named("every state twice", self.states.iter().flat_map(|state| [state.clone(), state.clone()]).collect()),
            named("rotated by one", rotated(1)),
            named("rotated by half", rotated(n / 2)),
            named("from the first and back", star),
        ];
        for seed in [1, 2] {
            let dice = &mut Dice::new(seed + n as u64);
            let walk = (0..2 * n).map(|_| dice.pick(&self.states)).collect();
            sequences.push(named(&format!("walk {seed}"), walk));
        }
        for state in &self.states {
            sequences.push(named(&format!("{} alone", state.name), vec![state.clone()]));
        }
        sequences.iter().flat_map(Self::cuts_and_keys).collect()
    }

    /// The same states with batches cut in every way and keys in every order.
    pub fn cuts_and_keys(&self) -> Vec<Self> {
        let mut all = Vec::new();
        for cut in [Cut::States, Cut::Squashed, Cut::Objects, Cut::Replaced] {
            for keys in [KeyOrder::Forward, KeyOrder::Reverse, KeyOrder::Shuffled] {
                let name = format!("{} (batches: {cut:?}, keys: {keys:?})", self.name);
                all.push(Self { name, cut, keys, ..self.clone() });
            }
        }
        all
    }

    /// Two scenarios at once, if no object is in both: their states alternate. What to expect is not
    /// written down, because the policies of one may apply to the endpoints of the other.
    pub fn interleaved(&self, other: &Self) -> Option<Self> {
        let keys = |scenario: &Self| -> BTreeSet<UpdateKey> {
            scenario.states.iter().flat_map(|state| state.facts.keys().cloned()).collect()
        };
        if self.host != other.host || !keys(self).is_disjoint(&keys(other)) {
            return None;
        }
        let (mut ours, mut theirs) = (State::empty(), State::empty());
        let mut states = Vec::new();
        for step in 0..self.states.len().max(other.states.len()) {
            for is_ours in [true, false] {
                // The shorter one begins again.
                let (present, scenario) = if is_ours { (&mut ours, self) } else { (&mut theirs, other) };
                *present = scenario.states[step % scenario.states.len()].clone();
                let facts = ours.facts.iter().chain(&theirs.facts).map(|(key, fact)| (key.clone(), fact.clone()));
                let name = format!("{} with {}", ours.name, theirs.name);
                states.push(State { name, facts: facts.collect(), expected: None });
            }
        }
        Some(Self { name: format!("{} with {}", self.name, other.name), states, ..self.clone() })
    }

    /// The batches of this scenario, and at its end the way back to nothing.
    pub fn stops(&self) -> Vec<Stop<'_>> {
        let mut stops: Vec<Stop<'_>> = Vec::new();
        let mut facts = Facts::new();
        let mut waiting = Vec::new();
        let nothing = Facts::new();
        let states = self.states.iter().map(|state| (state.name.as_str(), &state.facts, Some(state)));
        let last = self.states.len();
        for (index, (name, goal, state)) in states.chain([("the end", &nothing, None)]).enumerate() {
            let place = format!("{}, state {index} {name:?}", self.name);
            let mut way = self.way(&facts, goal, index as u64);
            let is_quiet = way.is_empty();
            if is_quiet {
                // As after a new list of a datastore in which nothing has changed.
                way = self.way(&nothing, goal, index as u64);
            }
            let is_last = |at: usize, way: &[Update]| at + 1 == way.len();
            for (at, update) in way.iter().enumerate() {
                note(&mut facts, update);
                waiting.push(update.clone());
                if matches!(self.cut, Cut::Objects | Cut::Replaced) && !is_last(at, &way) {
                    let updates = std::mem::take(&mut waiting);
                    stops.push(Stop { place: place.clone(), updates, facts: facts.clone(), state: None, is_quiet });
                }
            }
            if self.cut == Cut::Squashed && index + 1 < last {
                continue;
            }
            let updates = std::mem::take(&mut waiting);
            let is_quiet = is_quiet && self.cut != Cut::Squashed;
            stops.push(Stop { place, updates, facts: facts.clone(), state, is_quiet });
        }
        stops
    }

    /// The updates that lead from one set of facts to another.
    fn way(&self, from: &Facts, to: &Facts, seed: u64) -> Vec<Update> {
        let gone = from.iter().filter(|(key, _)| !to.contains_key(key)).map(|(key, fact)| (key, build::absent(fact)));
        let new = to.iter().filter(|(key, fact)| from.get(key) != Some(fact)).map(|(key, fact)| (key, fact.clone()));
        let by_key: BTreeMap<&UpdateKey, Update> = gone.chain(new).collect();
        let mut way: Vec<Update> = by_key.into_values().collect();
        match self.keys {
            KeyOrder::Forward => (),
            KeyOrder::Reverse => way.reverse(),
            KeyOrder::Shuffled => {
                let dice = &mut Dice::new(seed);
                (1..way.len()).for_each(|at| way.swap(at, dice.roll(at as u64 + 1) as usize));
            }
        }
        if self.cut == Cut::Replaced {
            let replaced = |update: Update| {
                let was_there = !build::is_absent(&update) && from.contains_key(&update.key());
                was_there.then(|| build::absent(&update)).into_iter().chain([update]).collect::<Vec<_>>()
            };
            way = way.into_iter().flat_map(replaced).collect();
        }
        way
    }
}

fn note(facts: &mut Facts, update: &Update) {
    if build::is_absent(update) {
        facts.remove(&update.key());
    } else {
        facts.insert(update.key(), update.clone());
    }
}

impl State {
    /// A state in which nothing is stored and nothing known.
    fn empty() -> Self {
        Self { name: "empty".to_owned(), facts: Facts::new(), expected: Some(BTreeMap::new()) }
    }

    /// What is known, in the form of an expectation: sets have the texts that the expectation has for
    /// them.
    pub fn render(&self, known: &Known) -> Vec<String> {
        let texts: BTreeMap<SetId, &str> = self
            .expected
            .iter()
            .flatten()
            .filter_map(|(subject, _)| Some((set_id(subject)?, subject.as_str())))
            .collect();
        let mut lines = Vec::new();
        for (id, set) in &known.sets {
            let subject = texts.get(id).map_or_else(|| format!("set with id {id}"), |text| (*text).to_owned());
            let members: Vec<String> = set.members.iter().map(|known| member(&known)).collect();
            lines.push(with_details(&subject, &members.join(" ")));
        }
        lines.extend(known.policies.keys().map(|key| format!("policy {key}")));
        for (name, program) in &known.profiles {
            lines.push(format!("profile {name}{}", if program.missing { " missing" } else { "" }));
        }
        for (interface, program) in &known.endpoints {
            let tiers = program.tiers.iter().map(|program| format!(" | {}", tier(program)));
            lines.push(format!("endpoint {interface}: {}{}", program.key, tiers.collect::<String>()));
        }
        for (name, program) in &known.host_endpoints {
            lines.push(with_details(&format!("hep {name}"), &program.endpoint.interface));
            let HostTiers { untracked, pre_dnat, normal, forward } = &program.tiers;
            for (word, list) in
                [("untracked", untracked), ("pre-dnat", pre_dnat), ("normal", normal), ("forward", forward)]
            {
                let tiers: Vec<String> = list.iter().map(tier).collect();
                if !tiers.is_empty() {
                    lines.push(format!("hep {name} {word}: {}", tiers.join(" | ")));
                }
            }
        }
        for (name, state) in &known.links {
            lines.push(format!("link {name} {} {}", state.index, if state.up { "up" } else { "down" }));
        }
        lines.sort();
        lines
    }

    /// The lines that [`render`](Self::render) must give, if they are known.
    pub fn expected_lines(&self) -> Option<Vec<String>> {
        let mut lines: Vec<String> = self.expected.as_ref()?.values().cloned().collect();
        lines.sort();
        Some(lines)
    }
}

fn with_details(subject: &str, details: &str) -> String {
    if details.is_empty() { format!("{subject}:") } else { format!("{subject}: {details}") }
}

/// What a line of an expectation is about.
fn subject(line: &str) -> String {
    let words = |n: usize| line.split_whitespace().take(n).collect::<Vec<_>>().join(" ");
    match line.split_whitespace().next() {
        Some("profile" | "link") => words(2),
        Some("set" | "ports") => {
            line.rsplit_once(": ").map_or_else(|| line.trim_end_matches(':'), |(subject, _)| subject).to_owned()
        }
        _ => line.split_once(": ").map_or_else(|| line.trim_end_matches(':'), |(subject, _)| subject).to_owned(),
    }
}

/// The id of the set that a subject describes.
fn set_id(subject: &str) -> Option<SetId> {
    let (kind, rest) = subject.split_once(' ')?;
    let service = || rest.split_once('/').expect("namespace/name");
    match kind {
        "set" => Some(build::selector(rest).id().clone()),
        "ports" => {
            let (port, selector) = rest.split_once(" of ").expect("<name>/<protocol> of <selector>");
            let (name, protocol) = port.split_once('/').expect("<name>/<protocol>");
            Some(SetId::for_named_port(build::selector(selector).id(), protocol, name))
        }
        "service" => Some(SetId::for_service(service().0, service().1)),
        "service-addresses" => Some(SetId::for_service_addresses(service().0, service().1)),
        _ => None,
    }
}

fn member(member: &SetMember) -> String {
    match member {
        SetMember::Net(net) => net.to_string(),
        SetMember::AddressPort { address, protocol, port } => {
            let protocol = match protocol {
                6 => "tcp",
                17 => "udp",
                132 => "sctp",
                _ => "?",
            };
            format!("{address},{protocol}:{port}")
        }
    }
}

fn tier(tier: &TierProgram) -> String {
    let mut text = format!("{} {}", tier.name, if tier.default_pass { "pass" } else { "deny" });
    for (word, list) in [("in", &tier.ingress), ("out", &tier.egress)] {
        if !list.is_empty() {
            let keys: Vec<String> = list.iter().map(|policy| policy.key.to_string()).collect();
            text += &format!(" {word} {}", keys.join(" "));
        }
    }
    text
}

/// Reads one fact: a line and the indented lines below it.
fn fact(line: &str, more: &[&str]) -> Update {
    let (kind, rest) = line.split_once(' ').unwrap_or_else(|| panic!("line {line:?}"));
    let mut words = rest.split_whitespace();
    let key = words.next().unwrap_or_else(|| panic!("line {line:?}"));
    let rules = |direction: &str| -> Vec<&str> {
        more.iter().filter_map(|line| line.strip_prefix(direction)?.strip_prefix(' ')).collect()
    };
    for line in more {
        assert!(line.starts_with("ingress ") || line.starts_with("egress "), "line {line:?}");
    }
    match kind {
        "wep" => wep(key, words),
        "hep" => hep(key, words),
        "policy" => {
            let (options, selector) = rest.split_once("selector ").unwrap_or((rest, "all()"));
            let mut builder = build::policy(key).selector(selector);
            for option in options.split_whitespace().skip(1) {
                builder = match option.split_once('=').unwrap_or((option, "")) {
                    ("tier", name) => builder.tier(name),
                    ("order", order) => builder.order(order.parse().unwrap()),
                    ("types", types) => builder.with(|policy| {
                        policy.ingress = types.contains("ingress");
                        policy.egress = types.contains("egress");
                    }),
                    ("untracked", _) => builder.with(|policy| policy.do_not_track = true),
                    ("pre-dnat", _) => builder.with(|policy| policy.pre_dnat = true),
                    ("forward", _) => builder.with(|policy| policy.apply_on_forward = true),
                    ("always", _) => builder.with(|policy| policy.always_needed = true),
                    _ => panic!("option {option:?} in {line:?}"),
                };
            }
            for text in rules("ingress") {
                builder = builder.ingress(text);
            }
            for text in rules("egress") {
                builder = builder.egress(text);
            }
            builder.build()
        }
        "tier" => {
            let words: Vec<&str> = words.collect();
            let order = words.iter().find_map(|word| word.strip_prefix("order=")).map(|order| order.parse().unwrap());
            build::tier(key, order, words.contains(&"pass"))
        }
        "rules" => build::profile_rules(key, &rules("ingress"), &rules("egress")),
        "labels" => build::profile_labels(key, words.next().unwrap_or_default()),
        "netset" => {
            let words: Vec<&str> = words.collect();
            let (labels, nets): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| word.contains('='));
            build::network_set(key, &labels.join(","), &nets)
        }
        "link" => {
            let index = words.next().map_or(0, |word| word.parse().unwrap());
            build::link(key, index, words.next() == Some("up"))
        }
        _ => panic!("line {line:?}"),
    }
}

fn wep<'a>(key: &str, options: impl Iterator<Item = &'a str>) -> Update {
    let mut builder = build::wep(key);
    for option in options {
        builder = match option.split_once('=').unwrap_or((option, "")) {
            ("ip", address) => builder.ip(address),
            ("label", label) => builder.label(label),
            ("profile", name) => builder.profile(name),
            ("interface", name) => builder.interface(name),
            ("port", port) => builder.port(port),
            ("mac", byte) => builder.with(|value| value.mac = Some([byte.parse().unwrap(); 6])),
            _ => panic!("option {option:?} of endpoint {key}"),
        };
    }
    builder.build()
}

fn hep<'a>(name: &str, mut words: impl Iterator<Item = &'a str>) -> Update {
    let mut builder = build::hep(name, words.next().unwrap_or_default());
    for option in words {
        builder = match option.split_once('=').unwrap_or((option, "")) {
            ("ip", address) => builder.ip(address),
            ("label", label) => builder.label(label),
            ("profile", name) => builder.profile(name),
            ("interface", name) => builder.interface(name),
            ("port", port) => builder.port(port),
            _ => panic!("option {option:?} of host endpoint {name}"),
        };
    }
    builder.build()
}
