//! Real packets through the real kernel, in random worlds: what comes out is what the evaluator of policy says, and
//! what the interpreter of chains says, without exception.
//!
//! `FELIX_WORLDS=n` tries n worlds per variant (`make worlds`); `FELIX_WORLD=seed` tries one. Needs root, iptables of
//! both variants and ipset; everything happens in two namespaces that the test makes and removes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that meets something unexpected fails")]
#![allow(clippy::print_stderr, reason = "a run of minutes tells how far it is")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use dataplane::options::Variant;
use felix_tests::ground::Ground;
use felix_tests::in_process::InProcess;
use felix_tests::worlds::{
    Expected, FEATURES, GENERATION, PACKETS, Trial, World, answers, deletions, features, model_of, options,
};
use model::{Family, Name, Update};
use testkit::interpret::Kernel;
use testkit::kernel_test;
use testkit::world::HOST;
use verdict::{Connection, Facts, Outcome, Reason, RuleOwner, RulePlace, Settings, Trace};

/// Worlds per variant in the ordinary run.
const WORLDS: u64 = 300;

/// The first seed of each variant, so that they try different worlds.
const SEEDS: [(Variant, u64); 2] = [(Variant::Legacy, 0), (Variant::Nft, 1_000_000)];

/// What must have decided, now and then.
const REASONS: [&str; 13] = [
    "rule of a policy",
    "rule of a profile",
    "end of a tier",
    "end of a missing tier",
    "missing profile",
    "nothing allowed",
    "known connection",
    "invalid connection",
    "inactive",
    "tunnel",
    "no endpoint",
    "spoofed",
    "spoofed with permission",
];

/// Everything of one run.
struct Run<'a> {
    variant: Variant,
    ground: &'a Ground,
    agent: InProcess,
    settings: Settings,
    facts: Facts,
    /// What the interpreter walks through.
    model: Kernel,
    tally: Tally,
}

/// How often what was tried.
#[derive(Debug, Default)]
struct Tally {
    packets: usize,
    arrived: usize,
    /// By protocol and family: dropped, arrived.
    protocols: BTreeMap<String, [usize; 2]>,
    /// By what decided: denied, allowed.
    reasons: BTreeMap<&'static str, [usize; 2]>,
    /// By what the rule that decided has: denied, allowed.
    features: BTreeMap<&'static str, [usize; 2]>,
    applying: Duration,
    sending: Duration,
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

fn agree_in_all_worlds(variant: Variant) {
    testkit::netns::cleanup().unwrap();
    let ground = Ground::new().unwrap();
    let first = SEEDS.iter().find(|(of, _)| *of == variant).map(|(_, seed)| *seed).unwrap();
    let n_worlds = number("FELIX_WORLDS").unwrap_or(WORLDS);
    let one = number("FELIX_WORLD");
    let seeds = one.map_or(first..first + n_worlds, |seed| seed..seed + 1);
    let tally = ground.host().enter(|| {
        let mut run = Run::new(variant, &ground, seeds.start);
        let began = Instant::now();
        for (index, seed) in (1_u64..).zip(seeds) {
            run.world(seed);
            if index % 50 == 0 {
                let Tally { packets, arrived, .. } = run.tally;
                let took = began.elapsed().as_secs();
                eprintln!("{}: {index} worlds, {packets} packets, {arrived} arrived, {took} s", variant.as_str());
            }
        }
        run.tally
    });
    eprintln!("{}: {tally:#?}", variant.as_str());
    if one.is_none() && n_worlds >= WORLDS {
        tally.assert_not_vacuous();
    }
}

impl<'a> Run<'a> {
    fn new(variant: Variant, ground: &'a Ground, seed: u64) -> Self {
        let (agent, model, settings) = agent_for(variant, seed);
        let mut run = Self { variant, ground, agent, settings, facts: Facts::new(), model, tally: Tally::default() };
        run.bring_into_force(seed, ground.links().unwrap());
        run
    }

    /// Replaces the agent by one that is started now and knows the same facts.
    fn restart(&mut self, seed: u64) {
        let facts: Vec<Update> = self.agent.facts().values().cloned().collect();
        (self.agent, self.model, self.settings) = agent_for(self.variant, seed);
        self.bring_into_force(seed, facts);
    }

    fn bring_into_force(&mut self, seed: u64, updates: Vec<Update>) {
        let began = Instant::now();
        for update in &updates {
            self.facts.put(update.clone());
        }
        let in_force = self.agent.batch(updates).and_then(|changes| Ok(self.model.apply(&changes)?));
        if let Err(error) = in_force {
            panic!("{}, FELIX_WORLD={seed}: {error:#}\n{}", self.variant.as_str(), self.state());
        }
        self.tally.applying += began.elapsed();
    }

    /// Goes from whatever is in force to the world of the seed.
    fn world(&mut self, seed: u64) {
        if seed.is_multiple_of(GENERATION) {
            self.restart(seed);
        }
        let mut world = World::new(seed);
        let steps = std::mem::take(&mut world.steps);
        let last = steps.len() - 1;
        let mut n_trials = 0;
        for (index, mut step) in steps.into_iter().enumerate() {
            if index == 0 {
                step.updates.splice(0..0, deletions(self.agent.facts()));
            }
            self.bring_into_force(seed, step.updates);
            if index == last && seed % GENERATION == GENERATION / 2 {
                self.restart(seed);
            }
            if step.packets > 0 {
                let routes = self.ground.routes().unwrap();
                let trials = world.trials(&routes, self.agent.facts().values(), step.packets);
                n_trials += trials.len();
                let arrived = self.exchange(&trials, true);
                self.compare(seed, &trials, &arrived);
                let answers = answers(&trials, &arrived, &routes);
                let arrived = self.exchange(&answers, false);
                self.compare(seed, &answers, &arrived);
            }
        }
        assert_eq!(n_trials, PACKETS, "{}, FELIX_WORLD={seed}", self.variant.as_str());
    }

    fn exchange(&mut self, trials: &[Trial], anew: bool) -> Vec<Option<Name>> {
        let began = Instant::now();
        let shots: Vec<_> = trials.iter().map(|trial| trial.shot.clone()).collect();
        let arrived = self.ground.exchange(&shots, anew).unwrap();
        self.tally.sending += began.elapsed();
        arrived
    }

    fn compare(&mut self, seed: u64, trials: &[Trial], arrived: &[Option<Name>]) {
        for (trial, arrived) in trials.iter().zip(arrived) {
            let expected = trial.expected(&self.facts, &self.settings, Trace::Off);
            let wanted = expected.arrives().then_some(&trial.to);
            if arrived.as_ref() != wanted || trial.interpreted(&self.model) != Ok(expected.arrives()) {
                panic!("{}", self.disagreement(seed, trial, arrived.as_ref()));
            }
            self.tally.count(trial, &expected, &self.facts);
        }
    }

    /// Everything that may help to find out who is right.
    fn disagreement(&self, seed: u64, trial: &Trial, arrived: Option<&Name>) -> String {
        let expected = trial.expected(&self.facts, &self.settings, Trace::On);
        let mut text = format!("{}, FELIX_WORLD={seed}\n{}", self.variant.as_str(), self.state());
        writeln!(text, "\n{} from {} to {}", trial.packet, trial.shot.from, trial.to).unwrap();
        writeln!(text, "came out at: {}", arrived.map_or("no interface", |name| name)).unwrap();
        writeln!(text, "by the interpreter: {:?}", trial.interpreted(&self.model)).unwrap();
        writeln!(text, "by the evaluator: {expected}").unwrap();
        writeln!(text, "\nonce more, and the rules that it met:\n{}", self.path_of(trial)).unwrap();
        text
    }

    fn state(&self) -> String {
        let mut text = String::new();
        for update in self.agent.facts().values() {
            writeln!(text, "{update:?}").unwrap();
        }
        text
    }

    /// Sends the packet alone and returns the rules whose counters have moved, and what is in their sets.
    fn path_of(&self, trial: &Trial) -> String {
        let variant = self.variant.as_str();
        let tool = if trial.packet.source.is_ipv4() { "iptables" } else { "ip6tables" };
        let tables = ["raw", "filter"];
        for table in tables {
            self.ground.host().exec(&[&format!("{tool}-{variant}"), "-w", "-t", table, "-Z"]).unwrap();
        }
        let arrived = self.ground.exchange(std::slice::from_ref(&trial.shot), true);
        let mut text = format!("{arrived:?}\n");
        for table in tables {
            let saved = self.ground.host().exec(&[&format!("{tool}-{variant}-save"), "-c", "-t", table]).unwrap();
            for line in saved.lines().filter(|line| line.starts_with('[') && !line.starts_with("[0:")) {
                writeln!(text, "{table} {line}").unwrap();
                let words: Vec<&str> = line.split(' ').collect();
                for set in words.windows(2).filter(|pair| pair[0] == "--match-set").map(|pair| pair[1]) {
                    writeln!(text, "{}", self.ground.host().exec(&["ipset", "save", set]).unwrap()).unwrap();
                }
            }
        }
        text
    }
}

fn agent_for(variant: Variant, seed: u64) -> (InProcess, Kernel, Settings) {
    let (options, settings) = options(seed);
    // The ground has routes of its own.
    let dataplane =
        dataplane::Options { variant: Some(variant), remove_external_routes: false, ..dataplane::Options::default() };
    let model = model_of(&options);
    (InProcess::new(HOST, options, dataplane).unwrap(), model, settings)
}

impl Tally {
    fn count(&mut self, trial: &Trial, expected: &Expected, facts: &Facts) {
        let arrives = usize::from(expected.arrives());
        self.packets += 1;
        self.arrived += arrives;
        let packet = &trial.packet;
        if packet.connection == Connection::New {
            self.protocols.entry(format!("{} of {}", packet.protocol, packet.family())).or_default()[arrives] += 1;
        }
        let Expected::Judged(forwarded) = expected else {
            self.reasons.entry("spoofed").or_default()[0] += 1;
            return;
        };
        if trial.is_spoofed {
            self.reasons.entry("spoofed with permission").or_default()[arrives] += 1;
        }
        for verdict in &forwarded.verdicts {
            let allows = usize::from(verdict.outcome == Outcome::Allow);
            self.reasons.entry(word(&verdict.reason)).or_default()[allows] += 1;
            if let Reason::Rule { rule, .. } = &verdict.reason {
                for feature in features(facts.rule(rule).unwrap(), packet.family()) {
                    self.features.entry(feature).or_default()[allows] += 1;
                }
            }
        }
    }

    /// That nothing ever came out, or that no rule decided anything, would be agreement too.
    fn assert_not_vacuous(&self) {
        let Self { packets, arrived, protocols, reasons, features, .. } = self;
        let share = arrived * 100 / packets;
        assert!((15..=85).contains(&share), "{share} % of the packets arrived");
        let own_icmp = [(1, Family::V4), (58, Family::V6)];
        let any = [4, 6, 17, 47, 132].into_iter().flat_map(|protocol| Family::BOTH.map(|family| (protocol, family)));
        for (protocol, family) in any.chain(own_icmp) {
            let name = format!("{protocol} of {family}");
            let counts = protocols.get(&name).copied().unwrap_or_default();
            assert!(counts.iter().all(|&count| count >= 10), "{name}: {counts:?} dropped and arrived");
        }
        for feature in FEATURES {
            let counts = features.get(feature).copied().unwrap_or_default();
            assert!(counts.iter().all(|&count| count >= 10), "{feature}: {counts:?} denied and allowed");
        }
        for reason in REASONS {
            let counts = reasons.get(reason).copied().unwrap_or_default();
            assert!(counts.iter().sum::<usize>() >= 20, "{reason}: {counts:?} denied and allowed");
        }
    }
}

fn word(reason: &Reason) -> &'static str {
    match reason {
        Reason::Rule { rule: RulePlace { owner: RuleOwner::Policy { .. }, .. }, .. } => "rule of a policy",
        Reason::Rule { rule: RulePlace { owner: RuleOwner::Profile(_), .. }, .. } => "rule of a profile",
        Reason::EndOfTier { is_missing: false, .. } => "end of a tier",
        Reason::EndOfTier { is_missing: true, .. } => "end of a missing tier",
        Reason::MissingProfile(_) => "missing profile",
        Reason::NothingAllowed => "nothing allowed",
        Reason::KnownConnection => "known connection",
        Reason::InvalidConnection => "invalid connection",
        Reason::Inactive => "inactive",
        Reason::Tunnel(_) => "tunnel",
        Reason::Failsafe(_) => "failsafe",
        Reason::NoForwardPolicy => "no forward policy",
        Reason::Undecided => "undecided",
        Reason::NoEndpoint { .. } => "no endpoint",
    }
}

#[test]
fn packets_in_random_worlds_are_judged_alike_by_iptables_legacy_and_by_the_specification() {
    kernel_test!("iptables-legacy-restore", "ip6tables-legacy-restore", "ipset");
    agree_in_all_worlds(Variant::Legacy);
}

#[test]
fn packets_in_random_worlds_are_judged_alike_by_iptables_nft_and_by_the_specification() {
    kernel_test!("iptables-nft-restore", "ip6tables-nft-restore", "ipset");
    agree_in_all_worlds(Variant::Nft);
}
