//! The route driver against a kernel in memory.

use std::sync::{Arc, Mutex, MutexGuard};

use ipnet::IpNet;
use proptest::prelude::*;

use super::plan::KernelRoute;
use super::wire::Reading;
use super::*;

/// The main tables and the neighbours of a kernel.
#[derive(Debug, Default)]
struct FakeKernel {
    routes: BTreeMap<(Family, RouteKey), Vec<KernelRoute>>,
    /// With whether they are permanent.
    neighbours: BTreeMap<(u32, std::net::Ipv4Addr), ([u8; 6], bool)>,
    log: Vec<String>,
    /// Errors for the next operations.
    errors: Vec<i32>,
    deaf: u32,
    interrupted: u32,
    reads: u32,
    /// Told at the next occasion.
    news: Vec<News>,
    /// Addresses of the walk that runs, and of all that have ended.
    walking: Option<Vec<String>>,
    walks: Vec<Vec<String>>,
    /// The walk that runs does not end.
    long_walk: bool,
}

#[derive(Clone, Debug, Default)]
struct FakeTransport(Arc<Mutex<FakeKernel>>);

impl conntrack::Transport for FakeTransport {
    fn start(&mut self, addresses: &BTreeSet<std::net::IpAddr>) {
        let mut kernel = self.0.lock().unwrap();
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        kernel.log.push(format!("walk {}", addresses.join(" ")));
        assert_eq!(kernel.walking.replace(addresses), None, "one at a time");
    }

    fn poll_end(&mut self, _context: &mut Context<'_>) -> Poll<Result<conntrack::Walk, conntrack::WalkError>> {
        let mut kernel = self.0.lock().unwrap();
        if kernel.long_walk {
            return Poll::Pending;
        }
        let Some(ended) = kernel.walking.take() else { return Poll::Pending };
        kernel.walks.push(ended);
        Poll::Ready(Ok(conntrack::Walk::default()))
    }
}

impl FakeKernel {
    fn hears(&mut self) -> io::Result<()> {
        if self.deaf == 0 {
            return Ok(());
        }
        self.deaf -= 1;
        Err(io::ErrorKind::TimedOut.into())
    }

    fn perform(&mut self, family: Family, op: &RouteOp) -> Result<(), i32> {
        self.log.push(show_op(op));
        if let Some(code) = self.errors.pop() {
            return Err(code);
        }
        match op {
            RouteOp::Replace(key, route) => {
                let routes = self.routes.entry((family, *key)).or_default();
                match routes.first_mut() {
                    Some(first) => *first = *route,
                    None => routes.push(*route),
                }
                let route = routes[0];
                let mut seen = false;
                routes.retain(|other| *other != route || !std::mem::replace(&mut seen, true));
            }
            RouteOp::Delete(key, index) => {
                let any = family == Family::V4 && key.metric == 0;
                let fits = |other: &RouteKey| *other == *key || (any && other.destination == key.destination);
                let found = self.routes.iter_mut().find_map(|((of, other), routes)| {
                    let at = routes.iter().position(|route| route.index == *index);
                    (*of == family && fits(other)).then_some(())?;
                    at.map(|at| (*other, routes.remove(at)))
                });
                let (other, _) = found.ok_or(libc::ESRCH)?;
                self.routes.retain(|(of, key), routes| (*of, *key) != (family, other) || !routes.is_empty());
            }
        }
        Ok(())
    }
}

impl Transport for FakeTransport {
    fn read(&mut self, family: Family) -> io::Result<Reading> {
        let mut kernel = self.0.lock().unwrap();
        kernel.hears()?;
        kernel.reads += 1;
        let complete = kernel.interrupted == 0;
        kernel.interrupted = kernel.interrupted.saturating_sub(1);
        let routes = kernel.routes.iter().filter(|((of, _), _)| *of == family);
        let routes = routes.flat_map(|((_, key), routes)| routes.iter().map(|route| (*key, *route)));
        Ok(Reading { routes: routes.step_by(if complete { 1 } else { 2 }).collect(), complete })
    }

    fn read_neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let mut kernel = self.0.lock().unwrap();
        kernel.hears()?;
        let permanent = kernel.neighbours.iter().filter(|(_, (_, permanent))| *permanent);
        Ok(permanent
            .map(|((index, address), (mac, _))| Neighbour { index: *index, address: *address, mac: *mac })
            .collect())
    }

    fn perform(&mut self, family: Family, ops: &[RouteOp]) -> io::Result<Vec<Result<(), i32>>> {
        let mut kernel = self.0.lock().unwrap();
        kernel.hears()?;
        Ok(ops.iter().map(|op| kernel.perform(family, op)).collect())
    }

    fn write_neighbours(&mut self, neighbours: &[Neighbour]) -> io::Result<Vec<Result<(), i32>>> {
        let mut kernel = self.0.lock().unwrap();
        kernel.hears()?;
        for neighbour in neighbours {
            kernel.log.push(format!("neighbour {} {} {:x}", neighbour.index, neighbour.address, neighbour.mac[5]));
            kernel.neighbours.insert((neighbour.index, neighbour.address), (neighbour.mac, true));
        }
        Ok(vec![Ok(()); neighbours.len()])
    }

    fn take_news(&mut self, out: &mut Vec<News>) -> io::Result<bool> {
        out.append(&mut self.0.lock().unwrap().news);
        Ok(false)
    }

    fn poll_news(&mut self, _context: &mut Context<'_>, out: &mut Vec<News>) -> Poll<io::Result<()>> {
        let mut kernel = self.0.lock().unwrap();
        out.append(&mut kernel.news);
        if out.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

struct Bed {
    now: Instant,
    transport: FakeTransport,
    routes: Routes,
}

impl Bed {
    fn new() -> Self {
        let transport = FakeTransport::default();
        let mut bed = Self { now: Instant::now(), routes: driver(&transport), transport };
        bed.link("lo", 1, true);
        bed.link("eth0", 2, true);
        bed
    }

    fn restart(&mut self) {
        let interfaces = std::mem::take(&mut self.routes.interfaces);
        self.routes = Routes { interfaces, ..driver(&self.transport) };
    }

    fn kernel(&self) -> MutexGuard<'_, FakeKernel> {
        self.transport.0.lock().unwrap()
    }

    fn link(&mut self, name: &str, index: u32, up: bool) {
        self.routes.want_link(&name.into(), Some(LinkState { index, up, generation: 1 }));
    }

    fn no_link(&mut self, name: &str, index: u32) {
        self.flush(index);
        self.routes.want_link(&name.into(), None);
    }

    /// The kernel drops all routes of an interface.
    fn flush(&self, index: u32) {
        self.kernel().routes.retain(|_, routes| {
            routes.retain(|route| route.index != index);
            !routes.is_empty()
        });
    }

    /// `10.65.0.2/32@1024` per route.
    fn want(&mut self, name: &str, routes: &str) {
        for family in Family::BOTH {
            let specs = routes.split_whitespace().map(|text| {
                let (destination, metric) = text.split_once('@').unwrap();
                let destination = destination.parse().unwrap();
                RouteSpec { destination, metric: metric.parse().unwrap(), mac: Some([0xee; 6]) }
            });
            let specs: Vec<_> = specs.filter(|spec| Family::of(&spec.destination) == family).collect();
            self.routes.want_routes(family, &name.into(), specs);
        }
    }

    fn put(&self, destination: &str, metric: u32, index: u32, protocol: u8) {
        let destination: IpNet = destination.parse().unwrap();
        let family = Family::of(&destination);
        let scope = if family == Family::V4 { 253 } else { 0 };
        let route = KernelRoute { index, protocol, kind: 1, scope, special: false };
        let key = RouteKey { destination, tos: 0, metric };
        self.kernel().routes.entry((family, key)).or_default().push(route);
    }

    fn sync_once(&mut self) -> DriverReport {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.routes.sync(self.now))
    }

    fn is_disturbed(&mut self) -> bool {
        self.routes.poll_disturbed(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    /// What the apply loop does with a batch: everything until there is nothing to do at once.
    fn sync(&mut self) -> DriverReport {
        let mut report = self.sync_once();
        for _ in 0..10 {
            if !self.is_disturbed() {
                return report;
            }
            report.superseded_by(self.sync_once());
        }
        panic!("the driver does not come to rest: {report:?}");
    }

    /// Somebody removes a route; the kernel tells.
    fn take(&self, destination: &str, metric: u32, by: u32) {
        let destination: IpNet = destination.parse().unwrap();
        let (family, key) = (Family::of(&destination), RouteKey { destination, tos: 0, metric });
        let mut kernel = self.kernel();
        for route in kernel.routes.remove(&(family, key)).unwrap_or_default() {
            kernel.news.push(News::Route(RouteNews { family, key, route, gone: true, by }));
        }
    }

    fn walks(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.kernel().walks)
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.kernel().log)
    }

    fn state(&self) -> Vec<String> {
        let kernel = self.kernel();
        let all = kernel.routes.iter().flat_map(|((_, key), routes)| routes.iter().map(move |route| show(key, route)));
        all.collect()
    }
}

fn driver(transport: &FakeTransport) -> Routes {
    Routes::with_transport(&Options::default(), Box::new(transport.clone()), Box::new(transport.clone()))
}

fn show(key: &RouteKey, route: &KernelRoute) -> String {
    format!("{}@{} dev {} proto {}", key.destination, key.metric, route.index, route.protocol)
}

fn show_op(op: &RouteOp) -> String {
    match op {
        RouteOp::Replace(key, route) => format!("replace {}@{} {}", key.destination, key.metric, route.index),
        RouteOp::Delete(key, index) => format!("delete {}@{} {index}", key.destination, key.metric),
    }
}

#[test]
fn a_route_waits_for_its_interface_and_goes_with_it() {
    for (route, metric) in [("10.65.0.2/32", 1024), ("fd10::2/128", 1024)] {
        let mut bed = Bed::new();
        bed.want("cali1", &format!("{route}@{metric}"));
        bed.sync();
        assert_eq!(bed.log().len(), 0, "no interface");
        bed.link("cali1", 7, false);
        bed.sync();
        assert_eq!(bed.log().len(), 0, "not up");
        bed.link("cali1", 7, true);
        bed.sync();
        assert_eq!(bed.log()[0], format!("replace {route}@{metric} 7"));
        bed.link("cali1", 7, false);
        bed.sync();
        let address = route.split('/').next().unwrap();
        assert_eq!(bed.log(), [format!("delete {route}@{metric} 7"), format!("walk {address}")]);
        bed.link("cali1", 7, true);
        bed.sync();
        assert_eq!(bed.state(), [format!("{route}@{metric} dev 7 proto 3")]);
        bed.log();
        bed.no_link("cali1", 7);
        assert_eq!(bed.sync().errors, Vec::<String>::new());
        assert_eq!(bed.log(), [format!("walk {address}")], "the kernel took the route along");
        assert_eq!(bed.state().len(), 0);
    }
}

#[test]
fn an_unchanged_restart_writes_nothing() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024 fd10::2/128@0");
    assert_eq!(bed.sync().writes, 3);
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3", "fd10::2/128@1024 dev 7 proto 3"]);
    bed.restart();
    bed.want("cali1", "10.65.0.2/32@1024 fd10::2/128@0");
    let report = bed.sync();
    assert_eq!((report.writes, report.reads, report.errors.len()), (0, 3, 0));
    let report = bed.sync();
    assert_eq!((report.writes, report.reads), (0, 0));
    assert_eq!(bed.routes.next_due(), Some((bed.now + Duration::from_secs(90), "route refresh")));
}

#[test]
fn a_route_of_another_shape_is_rewritten() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.2/32", 1024, 7, 4);
    bed.put("10.65.0.3/32", 1024, 2, 3);
    bed.want("cali1", "10.65.0.2/32@1024 10.65.0.3/32@1024");
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3", "10.65.0.3/32@1024 dev 7 proto 3"]);
}

#[test]
fn the_new_route_is_there_before_the_old_one_goes() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.2/32", 0, 7, 3);
    bed.put("10.65.0.9/32", 0, 7, 3);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    let expected = ["delete 10.65.0.9/32@0 7", "replace 10.65.0.2/32@1024 7", "delete 10.65.0.2/32@0 7"];
    assert_eq!(bed.log()[..3], expected);
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3"]);
}

#[test]
fn deleting_a_route_without_metric_that_is_gone_does_not_cost_its_successor() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.2/32", 0, 7, 3);
    bed.sync();
    // Somebody else deletes it meanwhile; the kernel takes a metric of 0 for "any".
    bed.kernel().routes.clear();
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3"]);
}

#[test]
fn unknown_routes_of_a_new_interface_stay_for_ten_seconds() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.2/32", 0, 7, 3);
    bed.put("10.65.8.0/26", 0, 2, 80);
    bed.put("10.65.9.0/26", 0, 2, 12);
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@0 dev 7 proto 3", "10.65.9.0/26@0 dev 2 proto 12"]);
    assert_eq!(bed.routes.next_due(), Some((bed.now + Duration::from_secs(10), "routes of unknown workloads")));
    bed.now += Duration::from_secs(10);
    bed.sync();
    assert_eq!(bed.state(), ["10.65.9.0/26@0 dev 2 proto 12"]);
    assert_eq!(bed.routes.next_due().unwrap().1, "route refresh");
}

#[test]
fn once_an_interface_had_routes_its_unwanted_ones_go_at_once() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.want("cali1", "");
    bed.put("10.65.0.3/32", 0, 7, 4);
    bed.routes.distrust();
    bed.sync();
    assert_eq!(bed.state().len(), 0);
}

#[test]
fn of_two_interfaces_the_newest_that_is_up_gets_the_address() {
    let mut bed = Bed::new();
    bed.link("cali-a", 10, true);
    bed.link("cali-b", 14, true);
    bed.want("cali-a", "10.65.0.2/32@1024");
    bed.sync();
    bed.want("cali-b", "10.65.0.2/32@1024");
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 14 proto 3"]);
    bed.link("cali-b", 14, false);
    bed.log();
    bed.sync();
    let expected = ["delete 10.65.0.2/32@1024 14", "walk 10.65.0.2", "replace 10.65.0.2/32@1024 10"];
    assert_eq!(bed.log(), expected, "packets must not bring the former holder's flows back");
    bed.link("cali-b", 14, true);
    bed.sync();
    bed.want("cali-b", "");
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 10 proto 3"]);
}

#[test]
fn a_short_outage_that_only_the_generation_shows_brings_the_routes_back() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.kernel().routes.clear();
    bed.log();
    bed.sync();
    assert_eq!(bed.log().len(), 0);
    bed.routes.want_link(&"cali1".into(), Some(LinkState { index: 7, up: true, generation: 2 }));
    bed.sync();
    assert_eq!(bed.log(), ["replace 10.65.0.2/32@1024 7", "neighbour 7 10.65.0.2 ee"]);
}

#[test]
fn the_same_name_with_another_index_is_another_interface() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.kernel().routes.clear();
    bed.link("cali1", 9, true);
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 9 proto 3"]);
}

#[test]
fn foreign_changes_are_repaired_at_the_refresh() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.kernel().routes.clear();
    bed.put("10.65.0.3/32", 0, 7, 4);
    bed.kernel().neighbours.values_mut().for_each(|neighbour| neighbour.1 = false);
    bed.now += Duration::from_secs(90);
    assert_eq!(bed.sync().writes, 3);
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3"]);
    assert!(bed.kernel().neighbours.values().all(|neighbour| neighbour.1));
}

#[test]
fn neighbours_are_written_for_single_ipv4_addresses_whenever_it_matters() {
    let mut bed = Bed::new();
    bed.link("tap1", 7, true);
    bed.routes.interfaces = {
        let options = Options { interface_prefixes: vec!["tap".into()], ..Options::default() };
        let mut interfaces = Interfaces::new(&options);
        interfaces.update(&"tap1".into(), Some(LinkState { index: 7, up: true, generation: 1 }));
        interfaces
    };
    bed.want("tap1", "10.65.0.2/32@1024 10.66.0.0/24@1024 fd10::2/128@1024");
    bed.sync();
    let neighbours = |log: Vec<String>| log.into_iter().filter(|line| line.starts_with("neigh")).collect::<Vec<_>>();
    assert_eq!(neighbours(bed.log()), ["neighbour 7 10.65.0.2 ee"]);
    bed.want("tap1", "10.65.0.2/32@1024 10.65.0.3/32@1024");
    bed.sync();
    assert_eq!(neighbours(bed.log()), ["neighbour 7 10.65.0.2 ee", "neighbour 7 10.65.0.3 ee"]);
    bed.want("tap1", "10.65.0.2/32@1024 10.65.0.3/32@1024");
    bed.sync();
    assert_eq!(neighbours(bed.log()).len(), 0);
    bed.link("tap1", 7, false);
    bed.sync();
    bed.link("tap1", 7, true);
    bed.sync();
    assert_eq!(neighbours(bed.log()).len(), 2);
    bed.kernel().neighbours.insert((7, [10, 65, 0, 2].into()), ([1; 6], true));
    bed.now += Duration::from_secs(90);
    bed.sync();
    assert_eq!(neighbours(bed.log()), ["neighbour 7 10.65.0.2 ee"], "only the one that differs");
}

#[test]
fn a_vanished_interface_is_no_error_and_the_others_are_served() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.link("cali2", 8, true);
    bed.want("cali1", "10.65.0.1/32@1024");
    bed.want("cali2", "10.65.0.2/32@1024");
    bed.kernel().errors = vec![libc::ENODEV];
    let report = bed.sync();
    assert_eq!(report.errors.len(), 0);
    assert!(report.waiting.unwrap().contains("cali1"));
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 8 proto 3"]);
    assert_eq!(bed.routes.next_due(), Some((bed.now + Duration::from_millis(100), "route retry")));
    // If the interface is said to be there for long, somebody should know.
    for round in 1..4 {
        bed.kernel().errors = vec![libc::ENODEV];
        bed.now += Duration::from_secs(1);
        assert_eq!(bed.sync().errors.len(), usize::from(round == 3));
    }
    bed.no_link("cali1", 7);
    bed.sync();
    assert_eq!(bed.routes.next_due().unwrap().1, "route refresh");
}

#[test]
fn a_refused_route_is_named_and_tried_again() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.1/32@1024 fd10::1/128@1024");
    bed.kernel().errors = vec![libc::EINVAL];
    let errors = bed.sync().errors;
    assert!(errors.len() == 1 && errors[0].contains("10.65.0.1/32") && errors[0].contains("cali1"), "{errors:?}");
    assert_eq!(bed.state(), ["fd10::1/128@1024 dev 7 proto 3"]);
    bed.now += Duration::from_millis(100);
    assert_eq!(bed.sync().errors.len(), 0);
    assert_eq!((bed.state().len(), bed.routes.next_due().unwrap().1), (2, "route refresh"));
}

#[test]
fn what_waits_for_its_next_attempt_is_not_well_because_the_rest_is() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.1/32@1024");
    bed.kernel().errors = vec![libc::EINVAL];
    assert_eq!(bed.sync().errors.len(), 1);
    bed.link("cali2", 8, true);
    bed.want("cali2", "10.65.0.2/32@1024");
    let report = bed.sync();
    assert_eq!(report.errors, Vec::<String>::new());
    assert!(report.writes > 0 && report.waiting.unwrap().contains("10.65.0.1/32"));
    // Nobody wants it any more.
    bed.want("cali1", "");
    assert_eq!(bed.sync().waiting, None);
}

#[test]
fn an_interrupted_reading_may_only_add() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.3/32", 0, 7, 4);
    bed.put("10.65.0.4/32", 0, 7, 4);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.kernel().interrupted = 100;
    let errors = bed.sync().errors;
    assert!(errors[0].contains("none is deleted"), "{errors:?}");
    assert_eq!(bed.state().len(), 3);
    bed.kernel().interrupted = 0;
    bed.now = bed.routes.next_due().unwrap().0;
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3"]);
}

#[test]
fn without_an_answer_everything_is_read_again_later() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.kernel().deaf = 1;
    assert_eq!(bed.sync().errors.len(), 1);
    let (due, why) = bed.routes.next_due().unwrap();
    assert_eq!((due, why), (bed.now + Duration::from_millis(100), "routes must be read"));
    assert!(bed.sync().waiting.is_some());
    bed.now = due;
    bed.sync();
    assert_eq!(bed.state().len(), 1);
}

#[test]
fn without_ipv6_its_routes_are_left_alone() {
    let transport = FakeTransport::default();
    let options = Options { ipv6: false, ..Options::default() };
    let routes = Routes::with_transport(&options, Box::new(transport.clone()), Box::new(transport.clone()));
    let mut bed = Bed { now: Instant::now(), routes, transport };
    bed.link("cali1", 7, true);
    bed.put("fd10::2/128", 1024, 7, 80);
    bed.want("cali1", "fd10::3/128@1024 10.65.0.2/32@1024");
    bed.sync();
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 7 proto 3", "fd10::2/128@1024 dev 7 proto 80"]);
}

/// U15.d, without the kernel: from the message to the write. The first message after a full reading costs no
/// other.
#[test]
fn a_route_that_somebody_removes_is_put_back_at_once_and_only_that_one() {
    for (route, other) in [("10.65.0.2/32", "10.65.0.3/32"), ("fd10::2/128", "fd10::3/128")] {
        let mut bed = Bed::new();
        bed.link("cali1", 7, true);
        bed.want("cali1", &format!("{route}@1024 {other}@1024"));
        bed.sync();
        let reads = bed.kernel().reads;
        bed.log();
        bed.take(route, 1024, 4711);
        assert!(bed.is_disturbed());
        bed.sync();
        assert_eq!(bed.log(), [format!("replace {route}@1024 7")]);
        assert_eq!((bed.kernel().reads, bed.routes.totals().restored), (reads, 1));
        assert_eq!(bed.walks().len(), 0, "nobody left");
    }
}

#[test]
fn a_route_that_somebody_changes_is_put_back_after_a_look() {
    for (route, replaced) in [("10.65.0.2/32", true), ("fd10::2/128", false)] {
        let mut bed = Bed::new();
        bed.link("cali1", 7, true);
        bed.want("cali1", &format!("{route}@1024"));
        bed.sync();
        // Another protocol: replaced in place, or a second one beside it.
        let destination: IpNet = route.parse().unwrap();
        let (family, key) = (Family::of(&destination), RouteKey { destination, tos: 0, metric: 1024 });
        {
            let mut kernel = bed.kernel();
            let routes = kernel.routes.get_mut(&(family, key)).unwrap();
            let foreign = KernelRoute { index: 2, protocol: 12, special: true, ..routes[0] };
            if replaced {
                routes[0] = foreign;
            } else {
                routes.push(foreign);
            }
            kernel.news.push(News::Route(RouteNews { family, key, route: foreign, gone: false, by: 9 }));
        }
        bed.log();
        bed.sync();
        let ours = format!("{route}@1024 dev 7 proto 3");
        assert!(bed.state().contains(&ours), "{:?}", bed.state());
        assert_eq!(bed.log().len(), usize::from(replaced), "what is not ours and not in the way stays");
    }
}

#[test]
fn news_of_routes_that_are_not_wanted_cost_nothing() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    let reads = bed.kernel().reads;
    let route = KernelRoute { index: 2, protocol: 12, kind: 1, scope: 0, special: true };
    for n in 0..5000_u32 {
        let destination = IpNet::new(std::net::Ipv4Addr::from(0x0a42_0000 + n * 256).into(), 24).unwrap();
        let key = RouteKey { destination, tos: 0, metric: 32 };
        let news = RouteNews { family: Family::V4, key, route, gone: n % 2 == 0, by: 4711 };
        bed.kernel().news.push(News::Route(news));
    }
    // What we do not know of ourselves changed a flag only.
    let key = RouteKey { destination: "10.65.0.2/32".parse().unwrap(), tos: 0, metric: 1024 };
    let route = KernelRoute { index: 7, protocol: 3, kind: 1, scope: 253, special: false };
    bed.kernel().news.push(News::Route(RouteNews { family: Family::V4, key, route, gone: false, by: 0 }));
    assert!(!bed.is_disturbed());
    bed.log();
    bed.sync_once();
    assert_eq!((bed.log().len(), bed.kernel().reads), (0, reads));
}

#[test]
fn lost_news_lead_to_a_full_reading_and_not_to_one_after_the_other() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    let readings = |bed: &Bed| bed.routes.totals().readings;
    let before = readings(&bed);
    bed.kernel().routes.clear();
    bed.kernel().news.push(News::Lost);
    bed.routes.reread_after = Some(bed.now + Duration::from_secs(1));
    assert!(bed.is_disturbed());
    bed.sync_once();
    assert_eq!(readings(&bed), before, "the last one was a moment ago");
    assert_eq!(bed.routes.next_due(), Some((bed.now + Duration::from_secs(1), "route messages were lost")));
    bed.kernel().news.push(News::Lost);
    assert!(!bed.is_disturbed(), "that is known");
    bed.now += Duration::from_secs(1);
    bed.sync();
    assert_eq!((readings(&bed), bed.state().len()), (before + 1, 1));
    assert_eq!(bed.routes.totals().lost_news, 2);
}

#[test]
fn a_neighbour_that_somebody_changes_is_written_again_at_once() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.log();
    let address = std::net::Ipv4Addr::new(10, 65, 0, 2);
    // As wanted; of another interface; of another address; then what dnsmasq does; then its removal.
    let cases = [
        (7, address, Some([0xee; 6]), false),
        (8, address, None, false),
        (7, std::net::Ipv4Addr::new(10, 65, 0, 3), None, false),
        (7, address, Some([0xaa; 6]), true),
        (7, address, None, true),
    ];
    for (index, address, mac, expected) in cases {
        bed.kernel().news.push(News::Neighbour(NeighbourNews { index, address, mac }));
        assert_eq!(bed.is_disturbed(), expected, "{index} {address} {mac:?}");
        bed.sync();
        assert_eq!(bed.log().len(), usize::from(expected), "{index} {address} {mac:?}");
    }
    assert_eq!(bed.routes.totals().restored_neighbours, 2);
}

#[test]
fn a_route_in_dispute_is_put_back_ten_times_a_second_at_most() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024 10.65.0.3/32@1024");
    bed.sync();
    bed.routes.disputes = Disputes::default();
    // What the kernel itself takes is no dispute.
    for by in [0, 9] {
        for _ in 0..5 {
            bed.take("10.65.0.2/32", 1024, by);
            // As the driver's own clock, which messages are stamped with while waiting, stands still here.
            bed.sync_once();
        }
    }
    assert_eq!(bed.state().len(), 1, "the fifth time waits");
    assert_eq!(bed.routes.next_due(), Some((bed.now + Duration::from_millis(100), "routes in dispute")));
    bed.take("10.65.0.3/32", 1024, 9);
    bed.sync_once();
    assert_eq!(bed.state().len(), 1, "another route does not wait");
    bed.now += Duration::from_millis(100);
    bed.sync_once();
    assert_eq!(bed.state().len(), 2);
}

// === departed addresses (host.md 10) ===

/// The examples of host.md 10.5 that have to do with local workloads, and trace B of 9.7.
#[test]
fn flows_are_forgotten_when_an_address_leaves_its_interface_and_only_then() {
    for (address, prefix) in [("10.65.0.2", 32), ("fd10::2", 128)] {
        let mut bed = Bed::new();
        bed.link("cali1", 7, true);
        bed.link("cali2", 8, true);
        let route = format!("{address}/{prefix}");
        let network = if prefix == 32 { "10.66.0.0/24" } else { "fd11::/64" };
        bed.want("cali1", &format!("{route}@1024 {network}@1024"));
        bed.sync();
        assert_eq!(bed.walks().len(), 0, "it came");
        bed.want("cali1", &format!("{route}@512 {network}@1024"));
        bed.sync();
        bed.want("cali1", &format!("{route}@1024 {network}@512"));
        bed.sync();
        assert_eq!(bed.walks().len(), 0, "only metrics changed");
        bed.want("cali1", "");
        bed.want("cali2", &format!("{route}@1024 {network}@512"));
        bed.log();
        bed.sync();
        let log: Vec<String> = bed.log().into_iter().filter(|line| !line.starts_with("neigh")).collect();
        let expected = [
            format!("delete {route}@1024 7"),
            format!("replace {network}@512 8"),
            format!("walk {address}"),
            format!("replace {route}@1024 8"),
        ];
        assert_eq!(log, expected, "it moved");
        bed.walks();
        bed.want("cali2", "");
        bed.sync();
        assert_eq!(bed.walks(), [[address]], "it left; a network has no flows of its own");
        // The interface is gone first, and with it the route.
        bed.want("cali1", &format!("{route}@1024"));
        bed.sync();
        bed.no_link("cali1", 7);
        bed.sync();
        assert_eq!(bed.walks(), [[address]]);
        bed.want("cali1", "");
        bed.sync();
        assert_eq!(bed.walks().len(), 0, "that was done");
    }
}

/// Trace C of host.md 9.7: the interface flaps.
#[test]
fn an_interface_that_goes_down_and_up_again_forgets_flows_once_and_gets_everything_back() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    bed.flush(7);
    bed.link("cali1", 7, false);
    let report = bed.sync();
    assert_eq!((report.errors.len(), bed.walks()), (0, vec![vec!["10.65.0.2".to_owned()]]));
    bed.log();
    bed.link("cali1", 7, true);
    bed.sync();
    assert_eq!(bed.log(), ["replace 10.65.0.2/32@1024 7", "neighbour 7 10.65.0.2 ee"]);
    assert_eq!(bed.walks().len(), 0);
}

#[test]
fn what_a_predecessor_left_is_forgotten_with_its_route_and_what_a_reading_misses_too() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.put("10.65.0.9/32", 1024, 7, 3);
    bed.want("cali1", "10.65.0.2/32@1024");
    bed.sync();
    assert_eq!(bed.walks(), [["10.65.0.9"]]);
    // The route of an endpoint goes with its removal and unseen before that.
    bed.kernel().routes.clear();
    bed.want("cali1", "");
    bed.routes.distrust();
    bed.sync();
    assert_eq!(bed.walks(), [["10.65.0.2"]]);
}

/// U14.c: nothing else waits for a walk, and what waits for it waits no longer.
#[test]
fn only_a_route_to_a_departed_address_waits_for_the_walk() {
    let mut bed = Bed::new();
    bed.link("cali1", 7, true);
    bed.link("cali2", 8, true);
    bed.want("cali1", "10.65.0.2/32@1024 10.65.0.3/32@1024");
    bed.sync();
    bed.kernel().long_walk = true;
    bed.want("cali1", "");
    bed.want("cali2", "10.65.0.2/32@1024 10.65.0.4/32@1024");
    let report = bed.sync();
    assert!(report.waiting.unwrap().contains("10.65.0.2 waits"));
    assert_eq!(bed.state(), ["10.65.0.4/32@1024 dev 8 proto 3"]);
    // No time brings it, only the end of the walk.
    assert_eq!(bed.routes.next_due().unwrap().1, "route refresh");
    // The next one to leave is for the next walk.
    bed.want("cali2", "10.65.0.2/32@1024");
    bed.sync();
    assert_eq!(bed.state().len(), 0);
    bed.kernel().long_walk = false;
    assert!(bed.is_disturbed());
    assert_eq!(bed.sync().waiting, None);
    assert_eq!(bed.state(), ["10.65.0.2/32@1024 dev 8 proto 3"]);
    assert_eq!(bed.walks(), [vec!["10.65.0.2", "10.65.0.3"], vec!["10.65.0.4"]]);
}

/// U17.b: of two that claim an address the loser's route comes with the winner's departure.
#[test]
fn the_loser_of_an_address_gets_it_when_the_winner_leaves() {
    for route in ["10.65.0.2/32", "fd10::2/128"] {
        let mut bed = Bed::new();
        bed.link("cali-a", 10, true);
        bed.link("cali-b", 14, true);
        for name in ["cali-a", "cali-b"] {
            bed.want(name, &format!("{route}@1024"));
        }
        bed.sync();
        assert_eq!(bed.state(), [format!("{route}@1024 dev 14 proto 3")], "the newest interface");
        bed.want("cali-b", "");
        bed.sync();
        assert_eq!(bed.state(), [format!("{route}@1024 dev 10 proto 3")]);
        assert_eq!(bed.walks().len(), 1);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Want(usize, Vec<(u8, bool)>),
    Link(usize, bool),
    NoLink(usize),
    NewIndex(usize),
    ForeignPut(u8, bool, usize, u8),
    ForeignDelete(u8, bool),
    ToldDelete(u8, bool),
    Flap(usize),
    Fail(i32),
    Deaf(u32),
    Interrupt(u32),
    Sync,
    Wait(u64),
}

const NAMES: [&str; 3] = ["cali1", "cali2", "cali3"];

fn calm_steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..3usize, prop::collection::vec((0..3u8, any::<bool>()), 0..4)).prop_map(|(n, w)| Step::Want(n, w)),
        3 => (0..3usize, any::<bool>()).prop_map(|(n, up)| Step::Link(n, up)),
        1 => (0..3usize).prop_map(Step::NoLink),
        1 => (0..3usize).prop_map(Step::NewIndex),
        1 => (0..3usize).prop_map(Step::Flap),
        1 => (0..3u8, any::<bool>()).prop_map(|(d, m)| Step::ToldDelete(d, m)),
        5 => Just(Step::Sync),
        1 => (0..20u64).prop_map(Step::Wait),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let code = prop::sample::select(vec![libc::ENODEV, libc::EINVAL, libc::ESRCH]);
    prop_oneof![
        15 => calm_steps(),
        2 => (0..3u8, any::<bool>(), 0..3usize, prop::sample::select(vec![3, 4, 80]))
            .prop_map(|(d, m, n, p)| Step::ForeignPut(d, m, n, p)),
        1 => (0..3u8, any::<bool>()).prop_map(|(d, m)| Step::ForeignDelete(d, m)),
        1 => (0..3u8, any::<bool>()).prop_map(|(d, m)| Step::ToldDelete(d, m)),
        1 => code.prop_map(Step::Fail),
        1 => (1..3u32).prop_map(Step::Deaf),
        1 => (1..12u32).prop_map(Step::Interrupt),
    ]
}

fn destination(n: u8) -> IpNet {
    ["10.65.0.1/32", "10.65.0.2/32", "fd10::1/128"][usize::from(n)].parse().unwrap()
}

fn metric(high: bool) -> u32 {
    if high { 1024 } else { 512 }
}

/// A bed, and what a naive observer knows of it.
struct Story {
    bed: Bed,
    links: BTreeMap<usize, (u32, bool)>,
    wanted: BTreeMap<usize, BTreeSet<(u8, bool)>>,
    next_index: u32,
    generation: u32,
}

impl Story {
    fn new() -> Self {
        let bed = Bed::new();
        bed.put("0.0.0.0/0", 0, 2, 16);
        Self { bed, links: BTreeMap::new(), wanted: BTreeMap::new(), next_index: 10, generation: 1 }
    }

    fn report_link(&mut self, n: usize) {
        if let Some((index, up)) = self.links.get(&n).copied() {
            if !up {
                self.bed.flush(index);
            }
            let state = LinkState { index, up, generation: self.generation };
            self.bed.routes.want_link(&NAMES[n].into(), Some(state));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Want(n, routes) => {
                let text: Vec<String> =
                    routes.iter().map(|(d, m)| format!("{}@{}", destination(*d), metric(*m))).collect();
                self.bed.want(NAMES[n], &text.join(" "));
                self.wanted.insert(n, routes.into_iter().collect());
            }
            Step::Link(n, up) => {
                self.next_index += 1;
                self.generation += 1;
                self.links.entry(n).or_insert((self.next_index, up)).1 = up;
                self.report_link(n);
            }
            Step::NoLink(n) => {
                if let Some((index, _)) = self.links.remove(&n) {
                    self.bed.no_link(NAMES[n], index);
                }
            }
            Step::NewIndex(n) => {
                self.next_index += 1;
                if let Some(link) = self.links.get_mut(&n) {
                    self.bed.flush(link.0);
                    link.0 = self.next_index;
                }
                self.report_link(n);
            }
            Step::Flap(n) => {
                self.generation += 1;
                if let Some((index, _)) = self.links.get(&n) {
                    self.bed.flush(*index);
                }
                self.report_link(n);
            }
            Step::ForeignPut(d, m, n, protocol) => {
                if let Some((index, true)) = self.links.get(&n).copied() {
                    let key = (Family::of(&destination(d)), key(d, m));
                    let taken = |routes: &Vec<KernelRoute>| routes.iter().any(|route| route.index == index);
                    if !self.bed.kernel().routes.get(&key).is_some_and(taken) {
                        self.bed.put(&destination(d).to_string(), metric(m), index, protocol);
                    }
                }
            }
            Step::ForeignDelete(d, m) => {
                self.bed.kernel().routes.remove(&(Family::of(&destination(d)), key(d, m)));
            }
            Step::ToldDelete(d, m) => self.bed.take(&destination(d).to_string(), metric(m), 4711),
            Step::Fail(code) => self.bed.kernel().errors.push(code),
            Step::Deaf(calls) => self.bed.kernel().deaf = calls,
            Step::Interrupt(calls) => self.bed.kernel().interrupted = calls,
            Step::Sync => {
                self.bed.sync();
            }
            Step::Wait(seconds) => self.bed.now += Duration::from_secs(seconds),
        }
    }

    /// What the kernel should have, sorted.
    fn expected(&self) -> Vec<String> {
        let mut best = BTreeMap::new();
        for (n, routes) in &self.wanted {
            if let Some((index, true)) = self.links.get(n) {
                for (d, m) in routes {
                    let winner = best.entry((destination(*d), metric(*m))).or_insert(0);
                    *winner = *index.max(winner);
                }
            }
        }
        let ours = best.iter().map(|((d, m), index)| format!("{d}@{m} dev {index} proto 3"));
        let mut lines: Vec<String> = ours.chain(["0.0.0.0/0@0 dev 2 proto 16".to_owned()]).collect();
        lines.sort();
        lines
    }

    fn state(&self) -> Vec<String> {
        let mut lines = self.bed.state();
        lines.sort();
        lines
    }
}

fn key(d: u8, m: bool) -> RouteKey {
    RouteKey { destination: destination(d), tos: 0, metric: metric(m) }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// Any history of wishes, interfaces, foreign changes and failures ends with the kernel as wanted,
    /// and with the routes of others as they were.
    #[test]
    fn any_history_ends_with_the_kernel_as_wanted(history in prop::collection::vec(steps(), 0..40)) {
        let mut story = Story::new();
        for step in history {
            let is_sync = matches!(step, Step::Sync);
            story.step(step);
            let at_once = story.bed.routes.next_due().is_some_and(|(due, _)| due <= story.bed.now);
            prop_assert!(!is_sync || !at_once || story.bed.routes.doubt == Doubt::Routes);
        }
        {
            let mut kernel = story.bed.kernel();
            (kernel.deaf, kernel.interrupted) = (0, 0);
            kernel.errors.clear();
        }
        for _ in 0..3 {
            story.bed.now += Duration::from_secs(100);
            story.bed.sync();
        }
        prop_assert_eq!(story.state(), story.expected());
        story.bed.now += Duration::from_secs(1);
        let last = story.bed.sync();
        prop_assert_eq!((last.writes, last.reads, last.errors.len()), (0, 0, 0));
    }

    /// Without foreign changes and failures every single call leaves the kernel as wanted.
    #[test]
    fn undisturbed_the_kernel_is_as_wanted_after_every_call(history in prop::collection::vec(calm_steps(), 0..60)) {
        let mut story = Story::new();
        for step in history {
            let is_sync = matches!(step, Step::Sync);
            story.step(step);
            if is_sync {
                prop_assert_eq!(story.state(), story.expected());
            }
        }
    }
}
