//! One world: a host with interfaces, others that use its kernel too, a datastore, and agents that live on it one
//! after the other. Everything follows from a seed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use compiler::options::EndpointToHost;
use dataplane::iptables::parse::is_our_chain;
use dataplane::{ChainInsertMode, Options, Variant};
use model::{Family, LinkState, Name, Update};
use testkit::interpret::Bits;
use testkit::kernel::faults::Rates;
use testkit::kernel::tables::{Quirks, References};
use testkit::kernel::{Link, SimKernel, State};
use testkit::world::{Dice, Domain, PREFIX, UPLINK};

use crate::agent::{Setup, Shared, live};
use crate::probes::{Judged, OURS, Probes};

/// Events of one world.
pub(crate) const EVENTS: u64 = 1000;

/// Events between two moments in which nothing goes wrong any more and all must come right.
const STRETCH: u64 = 200;

/// Interfaces that come and go.
const INTERFACES: [&str; 4] = ["cali1", "cali12", "cali2", PREFIX];

/// What came of a world.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// Changes of the datastore and of interfaces.
    pub(crate) events: u64,
    pub(crate) faults: u64,
    pub(crate) edits: u64,
    pub(crate) crashes: u64,
    /// Operations on the kernel.
    pub(crate) steps: u64,
    pub(crate) applies: u64,
    pub(crate) judged: Judged,
    /// Digest of all that happened.
    pub(crate) trace: u64,
}

/// What others do in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// Nothing goes wrong: every state in between is judged.
    Calm,
    /// Operations fail, are slow, and agents die.
    Faulty,
    /// Others edit what is ours, too.
    Wild,
}

struct World {
    seed: u64,
    dice: Dice,
    domain: Domain,
    kernel: SimKernel,
    probes: Probes,
    shared: Rc<Shared>,
    setup: Setup,
    mood: Mood,
    events: Cell<u64>,
    crashes: Cell<u64>,
    generation: Cell<u32>,
    links: RefCell<BTreeMap<Name, (Link, u32)>>,
}

/// Runs the world of a seed.
///
/// # Errors
///
/// What is wrong, with seed and number of the event.
pub(crate) fn run(seed: u64, events: u64) -> Result<Outcome, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let mut world = World::new(seed);
        let outcome = world.run(events).await;
        outcome.map_err(|error| format!("seed {seed}, event {}: {error}", world.events.get()))
    })
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let variant = if dice.one_in(2) { Variant::Legacy } else { Variant::Nft };
        let compiler = compiler::Options {
            check_invalid: !dice.one_in(4),
            endpoint_to_host: dice.pick(&[EndpointToHost::Drop, EndpointToHost::Accept, EndpointToHost::Return]),
            openstack: dice.one_in(4),
            ..compiler::Options::default()
        };
        // Half of the worlds are never looked at without a cause: whatever goes wrong, drivers must know themselves.
        let refreshes = dice.one_in(2);
        let defaults = Options::default();
        let dataplane = Options {
            variant: Some(variant),
            table_refresh: defaults.table_refresh.filter(|_| refreshes),
            set_refresh: defaults.set_refresh.filter(|_| refreshes),
            route_refresh: defaults.route_refresh.filter(|_| refreshes),
            post_write_check: if refreshes { defaults.post_write_check } else { Duration::from_secs(1_000_000) },
            // Much shorter than by default, so that those that hang come to an end while something else happens.
            program_timeout: Duration::from_secs(30),
            insert_mode: if dice.one_in(3) { ChainInsertMode::Append } else { ChainInsertMode::Insert },
            ..defaults
        };
        let lacks_icmp = dice.one_in(4);
        let mood = dice.pick(&[Mood::Calm, Mood::Faulty, Mood::Faulty, Mood::Wild]);
        let marks = &compiler.marks;
        let bits = Bits { ours: marks.all() | marks.drop, never_left: marks.drop };
        let kernel = SimKernel::new(seed, variant, bits);
        let probes = Probes::new(seed, bits, Domain::small(), lacks_icmp);
        {
            let mut state = kernel.state();
            state.quirks = Quirks { references: dice.pick(&[References::Current, References::AndAtStart]), lacks_icmp };
            state.is_modern = !dice.one_in(4);
            state.tells_all = !refreshes;
            state.guards_flows = mood == Mood::Calm;
            state.settle_others(&mut dice);
            if dice.one_in(2) {
                state.leave_stale_state(&mut dice);
            }
            state.observe(Box::new(probes.clone()));
        }
        let shared = Rc::new(Shared::default());
        for update in Domain::beginning() {
            shared.put(update);
        }
        let mut world = Self {
            seed,
            dice,
            domain: Domain::small(),
            kernel,
            probes,
            shared,
            setup: Setup { compiler, dataplane },
            mood,
            events: Cell::new(0),
            crashes: Cell::new(0),
            generation: Cell::new(0),
            links: RefCell::default(),
        };
        for name in INTERFACES.into_iter().chain([UPLINK]) {
            world.change_link(name.into(), true, true);
        }
        world
    }

    fn rates(&mut self) -> Rates {
        match self.mood {
            Mood::Calm => Rates { slow: 20, ..Rates::default() },
            Mood::Faulty => Rates {
                failures: self.dice.pick(&[5, 20, 60]),
                slow: 10,
                crash: self.dice.pick(&[0, 40, 200]),
                foreign: 0,
            },
            Mood::Wild => Rates {
                failures: self.dice.pick(&[0, 20, 60]),
                slow: 10,
                crash: self.dice.pick(&[0, 100]),
                foreign: self.dice.pick(&[10, 50]),
            },
        }
    }

    async fn run(&mut self, events: u64) -> Result<Outcome, String> {
        let mut lives = self.dice.clone();
        let (shared, kernel, setup, probes) =
            (Rc::clone(&self.shared), self.kernel.clone(), self.setup.clone(), self.probes.clone());
        let mut birth = move || -> Pin<Box<dyn Future<Output = ()>>> {
            let dice = Dice::new(lives.roll(u64::MAX));
            Box::pin(live(Rc::clone(&shared), kernel.clone(), setup.clone(), probes.clone(), dice))
        };
        let mut agent = birth();
        let kernel = self.kernel.clone();
        let crashes = self.crashes.clone();
        let crashes = Rc::new(crashes);
        let counted = Rc::clone(&crashes);
        let outcome = {
            let mut history = Box::pin(self.history(events));
            poll_fn(|cx| {
                loop {
                    kernel.state().undertaker = Some(cx.waker().clone());
                    if let Poll::Ready(outcome) = history.as_mut().poll(cx) {
                        return Poll::Ready(outcome);
                    }
                    if !kernel.state().has_crashed {
                        if agent.as_mut().poll(cx).is_ready() {
                            return Poll::Ready(Err("the agent ended".to_owned()));
                        }
                        if !kernel.state().has_crashed {
                            return Poll::Pending;
                        }
                    }
                    counted.set(counted.get() + 1);
                    agent = birth();
                    // A new agent connects when it is polled first.
                    kernel.state().has_crashed = false;
                }
            })
            .await
        };
        outcome?;
        let state = self.kernel.state();
        Ok(Outcome {
            events: self.events.get(),
            faults: state.counts.faults,
            edits: state.counts.edits,
            crashes: crashes.get(),
            steps: state.counts.steps,
            applies: *self.shared.applies.borrow(),
            judged: self.probes.judged(),
            trace: state.trace(),
        })
    }

    async fn history(&mut self, events: u64) -> Result<(), String> {
        while self.events.get() < events {
            let rates = self.rates();
            self.kernel.state().faults.rates = rates;
            let stretch = STRETCH.min(events - self.events.get());
            for _ in 0..stretch {
                self.events.set(self.events.get() + 1);
                self.event();
                self.check()?;
                let pause = match self.dice.roll(40) {
                    0..=19 => Duration::ZERO,
                    20..=29 => Duration::from_micros(self.dice.roll(5000)),
                    30..=37 => Duration::from_millis(self.dice.roll(300)),
                    38 => Duration::from_secs(self.dice.roll(20)),
                    _ => Duration::from_secs(self.dice.roll(200)),
                };
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            self.kernel.state().faults.rates = Rates::default();
            self.settle().await?;
        }
        Ok(())
    }

    fn event(&mut self) {
        match self.dice.roll(40) {
            0..=4 => {
                let name = Name::from(self.dice.pick(&INTERFACES));
                let (exists, up) =
                    self.dice.pick(&[(true, true), (true, true), (true, true), (true, false), (false, false)]);
                self.change_link(name, exists, up);
            }
            5 if self.mood == Mood::Wild => {
                let mut state = self.kernel.state();
                if let Some(word) = state.edit(&mut self.dice) {
                    state.counts.edits += 1;
                    state.note(word);
                }
            }
            6 if self.mood != Mood::Calm && self.dice.one_in(3) => self.kernel.state().die(),
            _ => {
                let mut update = self.domain.update(&mut self.dice);
                if let Update::WorkloadEndpoint(_, Some(endpoint)) = &mut update {
                    // The one thing that makes the raw table let more through.
                    let nets = ["10.0.0.0/8", "fd00::/8", "0.0.0.0/1", "8000::/1"].map(|net| net.parse().ok());
                    Arc::make_mut(endpoint).allowed_spoofed = self.dice.some(&nets, 1).into_iter().flatten().collect();
                }
                self.shared.put(update);
            }
        }
    }

    /// An interface comes, goes, or changes; the agent hears of it as the monitor would tell.
    fn change_link(&mut self, name: Name, exists: bool, up: bool) {
        let mut links = self.links.borrow_mut();
        let old = links.get(&name).copied();
        let mut generation = self.generation.get();
        let link = exists.then(|| {
            let flaps = old.is_some_and(|(old, _)| old.up && up);
            let index = match old {
                // Made anew under the old name.
                Some(_) if flaps && self.dice.one_in(3) => 100 + generation,
                Some((old, _)) => old.index,
                None => 100 + generation,
            };
            if up {
                generation += 1;
            }
            Link { index, up }
        });
        let mut state = self.kernel.state();
        // Whatever was there went down first.
        if let Some((old, _)) = old {
            state.set_link(&name, Some(Link { up: false, ..old }));
        }
        state.set_link(&name, link);
        drop(state);
        self.generation.set(generation + 1);
        let told = link.map(|link| LinkState { index: link.index, up: link.up, generation });
        match link {
            Some(link) => drop(links.insert(Name::clone(&name), (link, generation))),
            None => drop(links.remove(&name)),
        }
        drop(links);
        self.shared.put(Update::Link(name, told));
    }

    fn check(&self) -> Result<(), String> {
        let mut findings = self.probes.take_findings();
        findings.append(&mut self.kernel.state().take_complaints());
        match findings.first() {
            None => Ok(()),
            Some(first) => Err(format!("({:?}) {first}, and {} more", self.mood, findings.len() - 1)),
        }
    }

    /// Nothing goes wrong any more: in the end the kernel is what the datastore says, and a new agent has nothing
    /// to do.
    async fn settle(&mut self) -> Result<(), String> {
        // Twice the longest of the refresh intervals, and programs that hang.
        tokio::time::sleep(Duration::from_secs(500)).await;
        self.check()?;
        if !*self.shared.is_quiet.borrow() {
            return Err(format!("not settled: {}", self.shared.trouble.borrow()));
        }
        let insert_mode = self.setup.dataplane.insert_mode;
        if let Some(lack) = self.probes.lacks(&self.kernel.state(), insert_mode).first() {
            let refresh = self.setup.dataplane.table_refresh;
            return Err(format!("({:?}, refresh {refresh:?}) not as the last program says: {lack}", self.mood));
        }
        if self.mood == Mood::Calm
            && let Some(address) = self.kernel.state().orphans().first()
        {
            return Err(format!("{address} has no route any more, but tracked flows"));
        }
        self.compare().await?;
        self.kernel.state().is_tainted = false;
        if self.dice.one_in(3) {
            let before = self.kernel.state().counts.writes;
            // What others put on workload interfaces goes at the refresh; if there is none, a new agent's first
            // reading finds it (host.md 7.4).
            let foreign = match self.setup.dataplane.route_refresh {
                Some(_) => 0,
                None => {
                    let state = self.kernel.state();
                    (routes(&state, true).len() - routes(&state, false).len()) as u64
                }
            };
            self.kernel.state().die();
            tokio::time::sleep(Duration::from_secs(200)).await;
            self.check()?;
            let writes = self.kernel.state().counts.writes - before;
            // Whether the kernel takes what it refused once, a new agent must find out.
            if writes > foreign && !self.probes.is_refused() {
                return Err(format!("a new agent wrote {writes} times though nothing had changed (U1.b)"));
            }
        }
        Ok(())
    }

    /// Compares with what a new agent makes of an empty kernel.
    async fn compare(&self) -> Result<(), String> {
        let (variant, links) = (self.setup.dataplane.variant.unwrap_or(Variant::Legacy), self.links.borrow().clone());
        let fresh = SimKernel::new(self.seed, variant, Bits { ours: u32::MAX, never_left: 0 });
        fresh.state().quirks = self.kernel.state().quirks;
        let probes = self.probes.alone();
        for (name, (link, _)) in &links {
            fresh.state().set_link(name, Some(*link));
        }
        let shared = Rc::new(Shared::default());
        for update in self.shared.store.borrow().facts.values() {
            shared.put(update.clone());
        }
        let agent = live(Rc::clone(&shared), fresh.clone(), self.setup.clone(), probes.clone(), Dice::new(self.seed));
        tokio::time::timeout(Duration::from_secs(30), agent).await.ok();
        if !*shared.is_quiet.borrow() {
            return Err(format!("a new agent on an empty kernel does not settle: {}", shared.trouble.borrow()));
        }
        if let Some(finding) = probes.take_findings().first() {
            return Err(format!("a new agent on an empty kernel: {finding}"));
        }
        let refreshes = self.setup.dataplane.route_refresh.is_some();
        let (here, there) = (self.kernel.state(), fresh.state());
        let facts = [
            ("tables", tables(&here), tables(&there)),
            ("sets", sets(&here), sets(&there)),
            ("routes", routes(&here, refreshes), routes(&there, refreshes)),
            ("settings", settings(&here), settings(&there)),
        ];
        for (what, here, there) in facts {
            if let Some(line) = here.iter().find(|line| !there.contains(*line)) {
                return Err(format!("{what}: too much: {line}"));
            }
            if let Some(line) = there.iter().find(|line| !here.contains(*line)) {
                return Err(format!("{what}: missing: {line}"));
            }
            if here != there {
                return Err(format!("{what}: another order: {here:#?}\n{there:#?}"));
            }
        }
        let missing = there.neighbours.iter().find(|neighbour| !here.neighbours.contains(neighbour));
        missing.map_or(Ok(()), |neighbour| Err(format!("missing: {neighbour:?}")))
    }
}

/// Our chains, and our rules in the others' chains.
fn tables(state: &State) -> Vec<String> {
    let mut lines = Vec::new();
    for (key, table) in &state.tables {
        for (name, rules) in &table.chains {
            let is_ours = is_our_chain(name);
            if is_ours {
                lines.push(format!("{key:?} {name}"));
            }
            let ours = rules.iter().filter(|rule| is_ours || rule.hash.is_some());
            lines.extend(ours.map(|rule| format!("{key:?} {name} {}", rule.text)));
        }
    }
    lines
}

fn sets(state: &State) -> Vec<String> {
    let ours = state.sets.iter().filter(|(name, _)| name.starts_with("cali") || name.starts_with("felix"));
    ours.map(|(name, set)| format!("{name} {set:?}")).collect()
}

/// Routes of workload interfaces. What others put there goes at the refresh (host.md 7.4), if there is one.
fn routes(state: &State, refreshes: bool) -> Vec<String> {
    let workload = |index: u32| state.links.iter().any(|(name, link)| link.index == index && name.starts_with(PREFIX));
    let mut lines = Vec::new();
    for family in Family::BOTH {
        let routes = state.routes.get(&family).into_iter().flatten().filter(|(_, route)| workload(route.index));
        let routes = routes.filter(|(_, route)| refreshes || route.protocol == OURS);
        lines.extend(routes.map(|route| format!("{route:?}")));
    }
    lines.sort();
    lines
}

/// Settings whose failure is only told (host.md 4): there is one attempt each time the interface comes up.
const TOLERATED: [&str; 3] = ["accept_ra", "proxy_delay", "nf_conntrack_acct"];

/// An interface that is down is set up when it comes up.
fn settings(state: &State) -> Vec<String> {
    let is_down = |setting: &str| {
        setting.split('/').nth(3).is_some_and(|name| state.links.get(name).is_some_and(|link| !link.up))
    };
    let is_tolerated = |setting: &str| setting.rsplit('/').next().is_some_and(|last| TOLERATED.contains(&last));
    let all = state.settings.iter().filter(|(setting, _)| !is_down(setting) && !is_tolerated(setting));
    all.map(|(setting, value)| format!("{setting}={value}")).collect()
}
