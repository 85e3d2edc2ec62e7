//! Turns graph output into programs.
//!
//! Fed with one [`Batch`] at a time, returns the [`Changes`] of sets, tables and routes that bring the
//! kernel to the state after it. Inside, data moves one way:
//!
//! ```text
//! batch ─► sets ──────────────────────────────────────────────► changes.sets
//!       ─► sources (policies, profiles) ─► policy ─┐
//!       ─► endpoint, dispatch, static_chains ──────┴─► uses ──► changes.tables
//!       ─► routes ────────────────────────────────────────────► changes.routes
//! ```
//!
//! Invariants: the program after any history equals the one that a fresh compiler makes of the same
//! state (marks of endpoints with IPVS excepted); every jump target and every set that a rule names
//! exists; what cannot be programmed is closed and reported, never open; no text from the datastore
//! gets into a name or an interface match unless it was looked at here.

mod claims;
pub mod dispatch;
pub mod endpoint;
pub mod endpoint_marks;
mod lists;
pub mod marks;
pub mod names;
pub mod options;
pub mod policy;
pub mod routes;
pub mod sets;
mod sources;
pub mod static_chains;
#[cfg(test)]
mod tests;
pub mod uses;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use graph::{Batch, EndpointProgram};
use model::{Family, Name};
use program::{
    Action, Chain, ChainName, Changes, InterfaceMatch, InterfaceSpec, Match, RouteSpec, Rule, Side, Table, TableId,
};

pub use marks::{MarkError, Marks};
pub use options::Options;

use claims::Claims;
use dispatch::{HostDispatch, WorkloadDispatch};
use endpoint_marks::EndpointMarks;
use lists::Lists;
use sets::Sets;
use sources::Sources;
use uses::TableProgram;

/// The tables that we program.
const TABLES: [Table; 2] = [Table::Raw, Table::Filter];

/// Something in a batch that cannot be programmed, for the operator's log.
#[derive(Clone, Debug, PartialEq)]
pub struct Complaint {
    /// What the operator finds in the datastore, e.g. `np/openstack/ossg…`.
    pub object: String,
    pub reason: String,
}

/// How much a compiler has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Chains whose rules were made, once for each text.
    pub chains_rendered: u64,
    /// New contents and removals of chains in all changes, once for each table.
    pub chains_told: u64,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Compiler {
    options: Options,
    started: bool,
    tables: BTreeMap<TableId, TableProgram>,
    sets: Sets,
    sources: Sources,
    endpoints: BTreeMap<Name, Endpoint>,
    lists: Lists,
    /// Interfaces of endpoints that may use addresses of others.
    spoofing: BTreeSet<Name>,
    dispatch: WorkloadDispatch,
    claims: Claims,
    /// Chains for endpoint marks that are defined.
    mark_dispatch: BTreeSet<ChainName>,
    marks: EndpointMarks,
    work: Work,
}

/// What we remember of an endpoint.
#[derive(Debug)]
struct Endpoint {
    program: Arc<EndpointProgram>,
    chains: Vec<ChainName>,
    spec: InterfaceSpec,
    routes: BTreeMap<Family, Vec<RouteSpec>>,
}

impl Compiler {
    pub fn new(options: Options) -> Self {
        Self {
            marks: EndpointMarks::new(&options.marks),
            options,
            started: false,
            tables: BTreeMap::new(),
            sets: Sets::default(),
            sources: Sources::default(),
            endpoints: BTreeMap::new(),
            lists: Lists::default(),
            spoofing: BTreeSet::new(),
            dispatch: WorkloadDispatch::default(),
            claims: Claims::default(),
            mark_dispatch: BTreeSet::new(),
            work: Work::default(),
        }
    }

    /// How much was done so far: a measure of what changes cost, independent of the machine.
    pub const fn work(&self) -> Work {
        self.work
    }

    /// Number of destinations that more than one endpoint claims, for metrics (U17.b).
    pub const fn contested_destinations(&self) -> usize {
        self.claims.contested()
    }

    /// Returns the changes that bring the kernel to the state after this batch. The first call
    /// returns a complete program.
    pub fn compile(&mut self, batch: &Batch) -> (Changes, Vec<Complaint>) {
        let Batch {
            seq,
            links,
            sets_created,
            members,
            policies,
            profiles,
            endpoints,
            // Host endpoints are known and not programmed yet; the agent says so.
            host_endpoints: _,
            sets_removed,
        } = batch;
        let mut changes = Changes { seq: *seq, links: links.clone(), ..Changes::default() };
        let mut complaints = Vec::new();
        let first = !std::mem::replace(&mut self.started, true);
        if first {
            self.start(&mut changes);
        }
        for (id, contents) in sets_created {
            self.sets.create(&self.options, id, contents, &mut changes, &mut complaints);
        }
        for (id, delta) in members {
            self.sets.change(id, delta, &mut changes);
        }
        for (key, program) in policies {
            let Some(chains) = self.sources.set_policy(key, program.as_ref()) else { continue };
            let forced = program.as_ref().is_some_and(|program| program.always_needed);
            for table in self.filter_tables() {
                chains.iter().for_each(|chain| table.force(chain, forced));
            }
        }
        for (name, program) in profiles {
            self.sources.set_profile(name, program.as_ref());
        }
        let mut renamed = BTreeSet::new();
        let mut spoofing_changed = first;
        for (interface, program) in endpoints {
            let old = self.endpoints.remove(interface);
            let program = program.as_ref().filter(|program| self.is_programmable(interface, program, &mut complaints));
            if old.is_some() != program.is_some() {
                renamed.insert(Name::clone(interface));
            }
            let may_spoof = spoofing(program);
            if spoofing(old.as_ref().map(|old| &old.program)) != may_spoof {
                spoofing_changed = true;
                if may_spoof.is_empty() {
                    self.spoofing.remove(interface);
                } else {
                    self.spoofing.insert(Name::clone(interface));
                }
            }
            match program {
                Some(program) => self.set_endpoint(interface, program, old, &mut changes, &mut complaints),
                None => self.remove_endpoint(interface, old, &mut changes),
            }
        }
        if first || !renamed.is_empty() {
            self.define_dispatch(&renamed);
        }
        if spoofing_changed {
            self.define_rpf_skip();
        }
        // Sets go last: rules of this batch may not name them any more.
        for id in sets_removed.iter().filter(|id| !sets_created.contains_key(*id)) {
            self.sets.remove(id, &mut changes);
        }
        self.complain_of_contested(&mut complaints);
        self.define_lazy_chains(&mut complaints);
        for (id, table) in &mut self.tables {
            let table = table.finish();
            self.work.chains_told += table.chains.len() as u64;
            if !table.chains.is_empty() || !table.hooks.is_empty() {
                changes.tables.insert(*id, table);
            }
        }
        complaints.sort_by(|a, b| (&a.object, &a.reason).cmp(&(&b.object, &b.reason)));
        complaints.dedup();
        (changes, complaints)
    }

    /// Hooks, static chains, and an empty chain for whatever they jump to.
    fn start(&mut self, changes: &mut Changes) {
        let options = &self.options;
        for family in options.families() {
            for table in TABLES {
                let program = self.tables.entry(TableId { family: *family, table }).or_default();
                let mut define =
                    |chains: Vec<Chain>| chains.into_iter().for_each(|chain| program.define(Arc::new(chain)));
                match table {
                    Table::Filter => {
                        define(static_chains::filter(options, *family));
                        define(vec![Chain { name: ChainName::fixed(names::CIDR_BLOCK), rules: Vec::new() }]);
                        define(dispatch::hosts(options, table, HostDispatch::FromForward, &[], false));
                        define(dispatch::hosts(options, table, HostDispatch::ToForward, &[], false));
                    }
                    Table::Raw => define(static_chains::raw(options, *family)),
                    Table::Mangle | Table::Nat => {}
                }
                define(dispatch::hosts(options, table, HostDispatch::From, &[], false));
                define(dispatch::hosts(options, table, HostDispatch::To, &[], false));
                for (base, hooks) in static_chains::hooks(options, table) {
                    program.set_hooks(base, hooks);
                }
            }
            for (id, kind) in static_chains::sets(options, *family) {
                self.sets.create_fixed(options, *family, id, kind, changes);
            }
        }
    }

    /// Says whether an endpoint's interface is one that we may write rules and routes for.
    fn is_programmable(&self, interface: &str, program: &EndpointProgram, complaints: &mut Vec<Complaint>) -> bool {
        let ours = |prefix: &String| !prefix.is_empty() && interface.starts_with(prefix.as_str());
        let defect = names::interface_defect(interface).or_else(|| {
            (!self.options.interface_prefixes.iter().any(ours))
                .then_some("does not begin with an interface prefix of ours")
        });
        if let Some(defect) = defect {
            let reason = format!("the endpoint gets no rules and no routes: interface name {interface:?} {defect}");
            complaints.push(Complaint { object: format!("endpoint {}", program.key), reason });
        }
        defect.is_none()
    }

    fn set_endpoint(
        &mut self,
        interface: &Name,
        program: &Arc<EndpointProgram>,
        old: Option<Endpoint>,
        changes: &mut Changes,
        complaints: &mut Vec<Complaint>,
    ) {
        if endpoint::Limits::exceeded(&program.endpoint) {
            let reason = format!("packet rate or burst is above {} and cut", endpoint::MAX_RATE);
            complaints.push(Complaint { object: format!("endpoint {}", program.key), reason });
        }
        let mark = if self.options.ipvs { self.marks.allocate(interface) } else { None };
        let (lists, new_groups) = self.lists.hold(&program.tiers);
        let chains = endpoint::workload_chains_with(&self.options, interface, program, mark, lists);
        self.sources.hold_groups(new_groups);
        self.work.chains_rendered += chains.len() as u64;
        let new = Endpoint {
            program: Arc::clone(program),
            chains: chains.iter().map(|chain| chain.name.clone()).collect(),
            spec: InterfaceSpec { may_spoof: !program.endpoint.allowed_spoofed.is_empty() },
            routes: BTreeMap::new(),
        };
        for chain in chains {
            // The same text in both families.
            let chain = Arc::new(chain);
            for table in self.filter_tables() {
                table.define(Arc::clone(&chain));
            }
        }
        let new = self.set_routes(interface, new, old.as_ref(), changes);
        if old.as_ref().map(|old| old.spec) != Some(new.spec) {
            changes.interfaces.insert(Name::clone(interface), Some(new.spec));
        }
        self.endpoints.insert(Name::clone(interface), new);
        if let Some(old) = old {
            self.sources.drop_groups(&self.lists.release(&old.program.tiers));
        }
    }

    fn set_routes(
        &mut self,
        interface: &Name,
        mut new: Endpoint,
        old: Option<&Endpoint>,
        changes: &mut Changes,
    ) -> Endpoint {
        for family in self.options.families() {
            let routes = routes::workload_routes(&self.options, &new.program, *family);
            let known = old.and_then(|old| old.routes.get(family));
            if known != Some(&routes) {
                self.claims.change(interface, known.map_or(&[], Vec::as_slice), &routes);
                changes.routes.insert((*family, Name::clone(interface)), routes.clone());
            }
            new.routes.insert(*family, routes);
        }
        new
    }

    /// Names the endpoints that claim one destination (U17.b).
    fn complain_of_contested(&mut self, complaints: &mut Vec<Complaint>) {
        for (destination, interfaces) in self.claims.take_news() {
            let endpoints = interfaces.iter().filter_map(|name| Some((name, self.endpoints.get(name)?)));
            let endpoints: Vec<String> =
                endpoints.map(|(name, endpoint)| format!("{} on {name}", endpoint.program.key)).collect();
            let endpoints = endpoints.join(" and ");
            let reason = format!(
                "claimed by endpoints {endpoints}; its traffic goes to the newest of these interfaces that is up"
            );
            complaints.push(Complaint { object: format!("destination {destination}"), reason });
        }
    }

    fn remove_endpoint(&mut self, interface: &Name, old: Option<Endpoint>, changes: &mut Changes) {
        let Some(old) = old else { return };
        for table in self.filter_tables() {
            for chain in &old.chains {
                table.undefine(chain);
            }
        }
        self.sources.drop_groups(&self.lists.release(&old.program.tiers));
        self.marks.release(interface);
        for family in self.options.families() {
            self.claims.change(interface, old.routes.get(family).map_or(&[], Vec::as_slice), &[]);
            changes.routes.insert((*family, Name::clone(interface)), Vec::new());
        }
        changes.interfaces.insert(Name::clone(interface), None);
    }

    /// Follows interfaces that came or went.
    fn define_dispatch(&mut self, renamed: &BTreeSet<Name>) {
        let (mut chains, mut gone) = self.dispatch.changes(&self.options, &self.endpoints, renamed.iter());
        if self.options.ipvs {
            // One chain lists all marks anyway.
            let names: Vec<&str> = self.endpoints.keys().map(AsRef::as_ref).collect();
            let of_marks = dispatch::endpoint_marks(&self.options, &names, &[], &|name| self.marks.get(name));
            let new = of_marks.iter().map(|chain| chain.name.clone()).collect();
            let old = std::mem::replace(&mut self.mark_dispatch, new);
            gone.extend(old.difference(&self.mark_dispatch).cloned());
            chains.extend(of_marks);
        }
        self.work.chains_rendered += chains.len() as u64;
        let chains: Vec<_> = chains.into_iter().map(Arc::new).collect();
        for table in self.filter_tables() {
            for chain in &chains {
                table.define(Arc::clone(chain));
            }
            for name in &gone {
                table.undefine(name);
            }
        }
    }

    /// Exemptions from the reverse path check (netfilter.md 13.6), by interface and prefix (defect D7).
    fn define_rpf_skip(&mut self) {
        for (id, table) in self.tables.iter_mut().filter(|(id, _)| id.table == Table::Raw) {
            let mut rules = Vec::new();
            let endpoints = self.spoofing.iter().filter_map(|name| self.endpoints.get_key_value(name));
            for (interface, endpoint) in endpoints {
                let nets = endpoint.program.endpoint.allowed_spoofed.iter().filter(|net| Family::of(net) == id.family);
                for net in nets.collect::<BTreeSet<_>>() {
                    let matches = vec![
                        Match::In(InterfaceMatch::Exact(interface.as_ref().to_owned())),
                        Match::Net { side: Side::Source, negated: false, net: *net },
                    ];
                    rules.push(Rule::new(matches, Action::Accept));
                }
            }
            self.work.chains_rendered += 1;
            table.define(Arc::new(Chain { name: ChainName::fixed(names::RPF_SKIP), rules }));
        }
    }

    /// Renders the policy, profile and group chains that tables need and do not have, or whose source
    /// changed. What has no source is closed.
    fn define_lazy_chains(&mut self, complaints: &mut Vec<Complaint>) {
        let changed = self.sources.take_changed();
        let Self { options, tables, sets, sources, endpoints, work, .. } = self;
        let set_name = |id: &model::SetId, family| sets.name(id, family).cloned();
        for (id, table) in tables {
            for name in &changed {
                // What nobody needs yet may be needed through a group that is defined below.
                let chain = if table.is_needed(name) {
                    sources.render(options, *id, name, &set_name, complaints)
                } else {
                    None
                };
                match chain {
                    Some(chain) => {
                        work.chains_rendered += 1;
                        table.define_lazy(Arc::new(chain));
                    }
                    None => table.undefine(name),
                }
            }
            while let Some(name) = table.missing().cloned() {
                work.chains_rendered += 1;
                let chain = sources.render(options, *id, &name, &set_name, complaints);
                let chain = chain.unwrap_or_else(|| {
                    let reason = "rules refer to it, but it is not known; what gets there is dropped".to_owned();
                    complaints.push(Complaint { object: describe(&name, endpoints), reason });
                    policy::closed_chain(name)
                });
                table.define_lazy(Arc::new(chain));
            }
        }
    }

    fn filter_tables(&mut self) -> impl Iterator<Item = &mut TableProgram> {
        self.tables.iter_mut().filter(|(id, _)| id.table == Table::Filter).map(|(_, table)| table)
    }
}

fn spoofing(program: Option<&Arc<EndpointProgram>>) -> &[ipnet::IpNet] {
    program.map_or(&[], |program| &program.endpoint.allowed_spoofed)
}

/// Finds what a chain would be rendered from, for a complaint; slow, because it should not happen.
fn describe(chain: &ChainName, endpoints: &BTreeMap<Name, Endpoint>) -> String {
    use program::Direction::{Egress, Ingress};
    for endpoint in endpoints.values() {
        let tiers = endpoint.program.tiers.iter();
        let policies = tiers.flat_map(|tier| {
            let ingress = tier.ingress.iter().map(|policy| (policy, Ingress));
            ingress.chain(tier.egress.iter().map(|policy| (policy, Egress)))
        });
        for (policy, direction) in policies {
            if names::policy_chain(&policy.key, direction) == *chain {
                return policy.key.to_string();
            }
        }
        for profile in &endpoint.program.endpoint.profiles {
            if [Ingress, Egress].iter().any(|way| names::profile_chain(profile, *way) == *chain) {
                return format!("profile {profile}");
            }
        }
    }
    format!("chain {chain}")
}
