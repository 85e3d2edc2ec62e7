//! Routes to a local workload (host.md 8).

use graph::EndpointProgram;
use ipnet::IpNet;
use model::Family;
use program::RouteSpec;

use crate::options::Options;

/// The orchestrator whose floating IPs are always on.
const OPENSTACK: &str = "openstack";

/// Returns the routes of one family to a workload: its own networks in stored order, then floating IPs;
/// each destination once. An inactive workload has none.
pub fn workload_routes(options: &Options, program: &EndpointProgram, family: Family) -> Vec<RouteSpec> {
    let endpoint = program.endpoint.as_ref();
    if !endpoint.active {
        return Vec::new();
    }
    let mut destinations: Vec<IpNet> = match family {
        Family::V4 => endpoint.v4_nets.iter().copied().map(IpNet::V4).collect(),
        Family::V6 => endpoint.v6_nets.iter().copied().map(IpNet::V6).collect(),
    };
    if program.key.orchestrator.as_ref() == OPENSTACK {
        destinations.extend(endpoint.nats.iter().map(|(_, external)| IpNet::from(*external)));
    }
    let mut routes: Vec<RouteSpec> = Vec::with_capacity(destinations.len());
    for destination in destinations.into_iter().map(|net| net.trunc()).filter(|net| Family::of(net) == family) {
        if !routes.iter().any(|route| route.destination == destination) {
            routes.push(RouteSpec { destination, metric: options.route_metric(family), mac: endpoint.mac });
        }
    }
    routes
}
