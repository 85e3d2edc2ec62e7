//! The simulated kernel of `testkit` against the real one: routes, neighbours and interfaces that come and go. Both
//! must give the same answers, hold the same afterwards and tell the same of what others did.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;
use std::time::Duration;

use dataplane::routes::{
    KernelRoute, Neighbour, NeighbourNews, Netlink, News, RouteKey, RouteNews, RouteOp, Transport,
};
use dataplane::{Options, Variant};
use model::{Family, Name};
use testkit::interpret::Bits;
use testkit::kernel::{Link, SimKernel};
use testkit::netns::in_new_netns;
use testkit::world::Dice;

/// Operations per family.
const OPS: u32 = 1200;

const LINKS: [&str; 3] = ["calia", "calib", "calic"];

const V4: [&str; 4] = ["10.65.0.1/32", "10.65.0.2/32", "10.65.1.0/24", "10.65.0.0/16"];
const V6: [&str; 4] = ["fd65::1/128", "fd65::2/128", "fd65:1::/64", "fd65::/32"];

#[test]
fn route_operations_do_to_the_simulated_routes_what_they_do_to_the_real_ones() {
    testkit::kernel_test!("ip");
    for family in Family::BOTH {
        in_new_netns(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { Twins::new().compare(family) });
        });
    }
}

/// Both kernels and what was done to them.
struct Twins {
    kernel: SimKernel,
    simulated: Box<dyn Transport>,
    real: Netlink,
    dice: Dice,
    log: Vec<String>,
}

impl Twins {
    fn new() -> Self {
        let kernel = SimKernel::new(1, Variant::Nft, Bits { ours: 0, never_left: 0 });
        let simulated = kernel.connect(&Options::default()).routes;
        let real = Netlink::new(Duration::from_secs(5), true);
        Self { kernel, simulated, real, dice: Dice::new(11), log: Vec::new() }
    }

    fn compare(&mut self, family: Family) {
        let mut seen = [0_u32; 6];
        assert_eq!(self.news(family), ([News::Lost].to_vec(), [News::Lost].to_vec()));
        for _ in 0..OPS {
            match self.dice.roll(12) {
                0..=4 => {
                    let op = self.some_op(family);
                    let (wanted, got) = (self.real.perform(family, &[op]), self.simulated.perform(family, &[op]));
                    self.log.push(format!("{op:?}: {got:?}"));
                    let (wanted, got) = (wanted.unwrap(), got.unwrap());
                    assert_eq!(wanted, got, "{}", self.story());
                    seen[usize::from(got[0].is_ok())] += 1;
                }
                5 if family == Family::V4 => {
                    let neighbour = self.some_neighbour();
                    let wanted = self.real.write_neighbours(&[neighbour]).unwrap();
                    let got = self.simulated.write_neighbours(&[neighbour]).unwrap();
                    self.log.push(format!("{neighbour:?}: {got:?}"));
                    assert_eq!(wanted, got, "{}", self.story());
                    seen[2] += 1;
                }
                5..=7 => seen[3] += u32::from(self.somebody_removes(family)),
                8..=10 => {
                    self.change_link();
                    seen[4] += 1;
                }
                _ => seen[5] += u32::from(self.somebody_writes(family)),
            }
            let (wanted, got) = self.news(family);
            assert_eq!(wanted, got, "news; {}", self.story());
            assert_eq!(self.routes(family), (), "{}", self.story());
            if family == Family::V4 {
                let (mut wanted, mut got) =
                    (self.real.read_neighbours().unwrap(), self.simulated.read_neighbours().unwrap());
                wanted.sort();
                got.sort();
                assert_eq!(wanted, got, "neighbours; {}", self.story());
            }
        }
        seen[2] += u32::from(family == Family::V6) * 100;
        assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
    }

    /// The last operations.
    fn story(&self) -> String {
        let from = self.log.len().saturating_sub(25);
        format!("after these, the last one last:\n{}", self.log[from..].join("\n"))
    }

    fn routes(&mut self, family: Family) {
        let ours =
            |(key, _): &(RouteKey, KernelRoute)| nets(family).iter().any(|net| key.destination.to_string() == *net);
        let read = |transport: &mut dyn Transport| {
            let reading = transport.read(family).unwrap();
            assert!(reading.complete);
            let mut routes: Vec<String> =
                reading.routes.into_iter().filter(ours).map(|route| format!("{route:?}")).collect();
            routes.sort();
            routes
        };
        let (wanted, got) = (read(&mut self.real), read(self.simulated.as_mut()));
        assert_eq!(wanted, got, "routes; {}", self.story());
    }

    /// What each tells of others, sorted, and of the doers only whether it was the kernel itself.
    fn news(&mut self, family: Family) -> (Vec<News>, Vec<News>) {
        let take = |transport: &mut dyn Transport| {
            let mut news = Vec::new();
            while transport.take_news(&mut news).unwrap() {}
            news.retain(|news| match news {
                News::Lost => true,
                News::Route(news) => nets(family).iter().any(|net| news.key.destination.to_string() == *net),
                // Of those that are not permanent the real kernel has a lot to tell.
                News::Neighbour(NeighbourNews { address, .. }) => address.octets()[..2] == [10, 65],
            });
            for news in &mut news {
                if let News::Route(RouteNews { by, .. }) = news {
                    *by = (*by).min(1);
                }
            }
            news.sort_by_key(|news| format!("{news:?}"));
            news
        };
        (take(&mut self.real), take(self.simulated.as_mut()))
    }

    fn link(&mut self) -> (Name, Option<Link>) {
        let name = Name::from(self.dice.pick(&LINKS));
        let link = self.kernel.state().links.get(&name).copied();
        (name, link)
    }

    fn index(&mut self) -> u32 {
        // Mostly one that exists.
        (0..4).find_map(|_| self.link().1).map_or(4000, |link| link.index)
    }

    fn some_key(&mut self, family: Family) -> RouteKey {
        let destination = self.dice.pick(&nets(family)).parse().unwrap();
        let metric = match family {
            Family::V4 => self.dice.pick(&[0, 0, 0, 7]),
            Family::V6 => self.dice.pick(&[1024, 1024, 7]),
        };
        RouteKey { destination, tos: 0, metric }
    }

    fn some_route(&mut self, family: Family, protocol: u8) -> KernelRoute {
        let scope = if family == Family::V4 { 253 } else { 0 };
        KernelRoute { index: self.index(), protocol, kind: 1, scope, special: false }
    }

    fn some_op(&mut self, family: Family) -> RouteOp {
        let key = self.some_key(family);
        if self.dice.one_in(3) {
            let index = if self.dice.one_in(3) { 0 } else { self.index() };
            return RouteOp::Delete(key, index);
        }
        RouteOp::Replace(key, self.some_route(family, 3))
    }

    fn some_neighbour(&mut self) -> Neighbour {
        let address = self.dice.pick(&["10.65.0.1", "10.65.0.2"]).parse().unwrap();
        Neighbour { index: self.index(), address, mac: [2, 0, 0, 0, 0, self.dice.roll(3) as u8] }
    }

    fn somebody_removes(&mut self, family: Family) -> bool {
        let all = self.simulated.read(family).unwrap().routes;
        if all.is_empty() {
            return false;
        }
        let (key, route) = self.dice.pick(&all);
        let device = self.name_of(route.index);
        self.log.push(format!("somebody removes {key:?} {route:?}"));
        let metric = key.metric.to_string();
        let mut args = vec!["route", "del"];
        let destination = key.destination.to_string();
        args.extend([destination.as_str(), "dev", &device, "metric", &metric]);
        ip(family, &args);
        self.kernel.state().somebody_routes(family, &RouteOp::Delete(key, route.index)).unwrap();
        true
    }

    fn somebody_writes(&mut self, family: Family) -> bool {
        let (key, route) = (self.some_key(family), self.some_route(family, 4));
        let is_up = self.kernel.state().links.values().any(|link| link.index == route.index && link.up);
        if !is_up {
            return false;
        }
        let device = self.name_of(route.index);
        self.log.push(format!("somebody writes {key:?} {route:?}"));
        let (destination, metric) = (key.destination.to_string(), key.metric.to_string());
        ip(family, &["route", "replace", &destination, "dev", &device, "metric", &metric, "proto", "static"]);
        self.kernel.state().somebody_routes(family, &RouteOp::Replace(key, route)).unwrap();
        true
    }

    fn name_of(&self, index: u32) -> String {
        let state = self.kernel.state();
        let mut names = state.links.iter().filter(|(_, link)| link.index == index).map(|(name, _)| name.to_string());
        names.next().unwrap()
    }

    /// An interface comes, goes up or down, or goes.
    fn change_link(&mut self) {
        let (name, old) = self.link();
        let link = match old {
            None => {
                let peer = format!("{name}p");
                ip(Family::V4, &["link", "add", &name, "type", "veth", "peer", "name", &peer]);
                ip(Family::V4, &["link", "set", &peer, "up"]);
                let shown = ip(Family::V4, &["-o", "link", "show", &name]);
                let index = shown.split(':').next().unwrap().trim().parse().unwrap();
                Some(Link { index, up: false })
            }
            Some(Link { index, up: false }) => {
                ip(Family::V4, &["link", "set", &name, "up"]);
                Some(Link { index, up: true })
            }
            Some(Link { index, up: true }) if self.dice.one_in(2) => {
                ip(Family::V4, &["link", "set", &name, "down"]);
                Some(Link { index, up: false })
            }
            Some(Link { up: true, .. }) => {
                ip(Family::V4, &["link", "del", &name]);
                None
            }
        };
        self.log.push(format!("{name} becomes {link:?}"));
        self.kernel.state().set_link(&name, link);
    }
}

const fn nets(family: Family) -> [&'static str; 4] {
    match family {
        Family::V4 => V4,
        Family::V6 => V6,
    }
}

fn ip(family: Family, args: &[&str]) -> String {
    let mut command = Command::new("ip");
    command.args((family == Family::V6).then_some("-6")).args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
