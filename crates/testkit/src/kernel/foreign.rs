//! What others on the host do to the kernel: to what is ours, and to what is theirs.

use std::sync::Arc;

use dataplane::iptables::parse::is_our_chain;
use dataplane::routes::{KernelRoute, Neighbour, NeighbourNews, News, RouteKey, RouteOp};
use model::Family;
use program::{Member, SetKind, Table, TableId};

use super::rules::Line;
use super::sets::Set;
use super::tables::base_chains;
use super::{State, TableKey};
use crate::world::Dice;

/// Who edits.
const SOMEBODY: u32 = 4711;

/// Protocol of foreign routes (`RTPROT_STATIC`).
const STATIC: u8 = 4;

impl State {
    /// Puts in what the host's other users have there before the agent first starts.
    pub fn settle_others(&mut self, dice: &mut Dice) {
        let variant = self.variant;
        for family in Family::BOTH {
            for table in Table::ALL {
                let key = TableKey { variant, family, table };
                let contents = self.tables.entry(key).or_default();
                if dice.one_in(3) && self.variant == dataplane::Variant::Nft {
                    continue;
                }
                contents.make(table);
                for chain in ["DOCKER", "calico-dhcp"] {
                    contents.chains.insert(chain.into(), Arc::new(vec![Arc::new(Line::parse("-j RETURN"))]));
                }
                for base in base_chains(table) {
                    let rules = (0..dice.roll(3)).map(|n| foreign_rule(dice, n)).collect();
                    contents.chains.insert((*base).into(), Arc::new(rules));
                }
            }
        }
        let set = |kind, foreign_type| Set {
            kind,
            family: Family::V4,
            max_members: 100,
            members: [Member::Net("10.9.0.0/16".parse().expect("a network"))].into(),
            foreign_type,
        };
        self.sets.insert("docker".to_owned(), set(SetKind::Net, None));
        self.sets.insert("bitmap".to_owned(), set(SetKind::Net, Some("bitmap:port")));
        self.view_everything();
    }

    /// What an agent of an older release, or one that crashed, may have left.
    pub fn leave_stale_state(&mut self, dice: &mut Dice) {
        let stale = Set {
            kind: SetKind::Net,
            family: Family::V4,
            max_members: 100,
            members: [Member::Net("10.0.0.0/24".parse().expect("a network"))].into(),
            foreign_type: None,
        };
        self.sets.insert("felix-4-old".to_owned(), stale.clone());
        self.sets.insert("cali40stale".to_owned(), stale);
        for family in Family::BOTH {
            let key = TableKey { variant: self.variant, family, table: Table::Filter };
            let contents = self.tables.entry(key).or_default();
            contents.make(Table::Filter);
            let set = if family == Family::V4 { "-m set --match-set cali40stale src " } else { "" };
            let rule = |text: &str| Arc::new(Line::parse(text));
            contents.chains.insert("felix-FORWARD".into(), Arc::new(vec![rule("-j felix-TO"), rule("-j cali-stale")]));
            contents.chains.insert("felix-TO".into(), Arc::new(vec![rule("-j DROP")]));
            contents.chains.insert("cali-stale".into(), Arc::new(vec![rule(&format!("{set}-j DROP"))]));
            let forward = contents.chains.entry("FORWARD".into()).or_default();
            Arc::make_mut(forward).insert(0, rule("-j felix-FORWARD"));
            if dice.one_in(2) {
                let hook = "-m comment --comment \"cali:AAAAAAAAAAAAAAAA\" -j cali-stale";
                Arc::make_mut(forward).push(rule(hook));
            }
        }
        self.view_everything();
    }

    /// One edit by somebody else. Returns a word about it, or nothing if there was nothing to edit.
    pub fn edit(&mut self, dice: &mut Dice) -> Option<&'static str> {
        match dice.roll(16) {
            0..=5 => self.edit_rule(dice),
            6 | 7 => self.edit_hooks(dice),
            8..=10 if !self.tells_all => self.edit_set(dice),
            11 | 12 => self.edit_routes(dice),
            13 => self.edit_neighbours(dice),
            14 => self.flush_table(dice),
            _ => self.add_foreign_rule(dice),
        }
    }

    fn some_table(&self, dice: &mut Dice) -> Option<TableKey> {
        let made: Vec<TableKey> = self.tables.iter().filter(|(_, table)| table.is_made).map(|(key, _)| *key).collect();
        (!made.is_empty()).then(|| dice.pick(&made))
    }

    fn edit_rule(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let key = self.some_table(dice)?;
        let contents = self.tables.get_mut(&key)?;
        let ours: Vec<Box<str>> = contents.chains.keys().filter(|name| is_our_chain(name)).cloned().collect();
        if ours.is_empty() {
            return None;
        }
        let chain = dice.pick(&ours);
        let rules = Arc::make_mut(contents.chains.get_mut(&chain)?);
        let at = dice.roll(rules.len().max(1) as u64) as usize;
        let word = match dice.roll(4) {
            0 if at < rules.len() => {
                rules.remove(at);
                "rule deleted"
            }
            1 if at < rules.len() => {
                rules[at] = Arc::new(Line::parse("-j RETURN"));
                "rule replaced"
            }
            2 if at < rules.len() => {
                let twice = Arc::clone(&rules[at]);
                rules.insert(at, twice);
                "rule doubled"
            }
            _ => {
                rules.insert(at.min(rules.len()), Arc::new(Line::parse("-s 10.0.0.1/32 -j DROP")));
                "rule inserted into a chain of ours"
            }
        };
        self.table_edited(key, &[chain]);
        Some(word)
    }

    fn edit_hooks(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let key = self.some_table(dice)?;
        let base: Box<str> = dice.pick(base_chains(key.table)).into();
        let contents = self.tables.get_mut(&key)?;
        let rules = Arc::make_mut(contents.chains.get_mut(&base)?);
        let at = rules.iter().position(|rule| rule.hash.is_some())?;
        let word = if dice.one_in(2) {
            rules.remove(at);
            "hook deleted"
        } else {
            let hook = rules.remove(at);
            rules.push(hook);
            "hook moved"
        };
        self.table_edited(key, &[base]);
        Some(word)
    }

    /// A rule of somebody else, that stops nothing and lets nothing through.
    fn add_foreign_rule(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let key = self.some_table(dice)?;
        let base = dice.pick(base_chains(key.table));
        let rules = Arc::make_mut(self.tables.get_mut(&key)?.chains.get_mut(base)?);
        let number = 100 + rules.len() as u64;
        let rule = foreign_rule(dice, number);
        if dice.one_in(3) {
            rules.push(rule);
        } else {
            rules.insert(0, rule);
        }
        self.table_edited(key, &[base.into()]);
        Some("foreign rule")
    }

    /// `iptables -F; iptables -X`, as a firewall script does it, but for what the script knows as its own.
    fn flush_table(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let key = self.some_table(dice)?;
        let contents = self.tables.get_mut(&key)?;
        let touched: Vec<Box<str>> = contents.chains.keys().cloned().collect();
        contents.chains.retain(|name, _| !is_our_chain(name));
        for rules in contents.chains.values_mut() {
            let is_ours = |line: &Line| line.hash.is_some() || line.target.as_deref().is_some_and(is_our_chain);
            Arc::make_mut(rules).retain(|line| !is_ours(line));
        }
        self.table_edited(key, &touched);
        Some("table flushed")
    }

    fn edit_set(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let ours: Vec<String> = self.sets.keys().filter(|name| name.starts_with("cali")).cloned().collect();
        if ours.is_empty() {
            return None;
        }
        let name = dice.pick(&ours);
        let in_use = self.is_set_busy(&name);
        let set = self.sets.get_mut(&name)?;
        let word = match dice.roll(4) {
            0 if !in_use => {
                self.sets.remove(&name);
                "set destroyed"
            }
            1 => {
                set.members.clear();
                "set flushed"
            }
            2 if set.kind == SetKind::Net => {
                let net = if set.family == Family::V4 { "172.16.0.1/32" } else { "fd00:9::/64" };
                set.members.insert(Member::Net(net.parse().expect("a network")));
                "member added"
            }
            _ => {
                let first = set.members.first().copied()?;
                set.members.remove(&first);
                "member removed"
            }
        };
        self.set_changed(&name);
        self.edited();
        Some(word)
    }

    fn edit_routes(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let family = dice.pick(&Family::BOTH);
        let links: Vec<u32> = self.links.values().filter(|link| link.up).map(|link| link.index).collect();
        let routes = self.routes.entry(family).or_default();
        if dice.one_in(2) && !routes.is_empty() {
            // A deletion of somebody else's route is their business; the simulation keeps those.
            let ours: Vec<usize> = (0..routes.len()).filter(|at| routes[*at].1.protocol != STATIC).collect();
            if ours.is_empty() {
                return None;
            }
            let at = dice.pick(&ours);
            if dice.one_in(3) {
                routes[at].1.special = true;
                let (key, route) = routes[at];
                self.tell_route(family, key, route, false, SOMEBODY);
                return Some("route changed");
            }
            let (key, route) = routes.remove(at);
            self.tell_route(family, key, route, true, SOMEBODY);
            return Some("route deleted");
        }
        if links.is_empty() {
            return None;
        }
        let text = if family == Family::V4 { "10.7.0.0/24" } else { "fd07::/64" };
        let key = RouteKey { destination: text.parse().expect("a network"), tos: 0, metric: 7 };
        let route = KernelRoute { index: dice.pick(&links), protocol: STATIC, kind: 1, scope: 0, special: false };
        if !routes.iter().any(|(have, _)| *have == key) {
            routes.push((key, route));
            self.tell_route(family, key, route, false, SOMEBODY);
        }
        Some("foreign route")
    }

    /// Somebody else writes or removes a route, and the agent is told.
    ///
    /// # Errors
    ///
    /// The kernel's number.
    pub fn somebody_routes(&mut self, family: Family, op: &RouteOp) -> Result<(), i32> {
        let (RouteOp::Replace(key, _) | RouteOp::Delete(key, _)) = op;
        let had = |state: &Self, index: u32| {
            let mut routes = state.routes.get(&family).into_iter().flatten();
            routes.find(|(have, route)| have == key && (index == 0 || route.index == index)).copied()
        };
        let before = had(self, if let RouteOp::Delete(_, index) = op { *index } else { 0 });
        self.perform_route(family, op)?;
        match (op, before) {
            // IPv4 has nothing to tell of a route that replaces itself.
            (RouteOp::Replace(_, route), Some((_, had))) if *route == had && family == Family::V4 => {}
            (RouteOp::Replace(key, route), _) => self.tell_route(family, *key, *route, false, SOMEBODY),
            (RouteOp::Delete(..), Some((key, route))) => self.tell_route(family, key, route, true, SOMEBODY),
            (RouteOp::Delete(..), None) => {}
        }
        Ok(())
    }

    fn edit_neighbours(&mut self, dice: &mut Dice) -> Option<&'static str> {
        let all: Vec<Neighbour> = self.neighbours.iter().copied().collect();
        if all.is_empty() {
            return None;
        }
        let gone = dice.pick(&all);
        self.neighbours.remove(&gone);
        let Neighbour { index, address, mac: _ } = gone;
        self.tell(News::Neighbour(NeighbourNews { index, address, mac: None }));
        Some("neighbour removed")
    }

    fn table_edited(&mut self, key: TableKey, chains: &[Box<str>]) {
        if key.variant == self.variant {
            let id = TableId { family: key.family, table: key.table };
            chains.iter().for_each(|chain| self.view_chain(id, chain));
        }
        self.tell_table(key, chains);
        self.edited();
    }
}

fn foreign_rule(dice: &mut Dice, number: u64) -> Arc<Line> {
    let target = dice.pick(&["DOCKER", "calico-dhcp"]);
    // Two at different ends must not be one and the same.
    let text = format!("-m comment --comment \"theirs {number} {}\" -j {target}", dice.roll(1000));
    Arc::new(Line::parse(&text))
}
