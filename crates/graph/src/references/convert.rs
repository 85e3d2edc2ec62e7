//! One rule becomes one program (policy.md ).

use std::sync::Arc;

use model::{EntityMatch, Name, Port, PortRange, Protocol, Rule, Selector, SetId};

use super::Need;
use crate::batch::{RuleProgram, SideProgram};

/// Where the members of a set come from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SetSource {
    /// Addresses of everything that matches (M-10).
    Selector(Arc<Selector>),
    /// Addresses and ports of endpoints that match (M-20); `None` is any protocol.
    NamedPort {
        selector: Arc<Selector>,
        protocol: Option<u8>,
        port: Name,
    },
    /// Nothing fills it.
    Service,
    ServiceAddresses,
}

/// Converts a rule and adds what it refers to to `needs`.
pub(super) fn rule(rule: Rule, index: u32, match_all: &Arc<Selector>, needs: &mut Vec<Need>) -> RuleProgram {
    let (source_service, destination_service) = (rule.source.service.clone(), rule.destination.service.clone());
    let mut source = side(rule.source, rule.protocol.as_ref(), match_all, needs);
    let mut destination = side(rule.destination, rule.protocol.as_ref(), match_all, needs);
    if let Some(service) = source_service {
        let id = SetId::for_service_addresses(&service.namespace, &service.name);
        needs.push((id.clone(), SetSource::ServiceAddresses));
        source.sets.push(id);
    }
    if let Some(service) = destination_service {
        let id = SetId::for_service(&service.namespace, &service.name);
        needs.push((id.clone(), SetSource::Service));
        destination.address_port_sets.push(id);
    }
    RuleProgram {
        action: rule.action,
        family: rule.family,
        protocol: rule.protocol,
        not_protocol: rule.not_protocol,
        icmp: rule.icmp,
        not_icmp: rule.not_icmp,
        source,
        destination,
        annotations: rule.annotations,
        index,
    }
}

fn side(
    entity: EntityMatch,
    protocol: Option<&Protocol>,
    match_all: &Arc<Selector>,
    needs: &mut Vec<Need>,
) -> SideProgram {
    // Positive and negative merge, a negative one alone stays.
    let (positive, negative) = match (entity.selector, entity.not_selector) {
        (Some(positive), Some(negative)) => (Some(Arc::new(positive.and(&negative.negated()))), None),
        (positive, negative) => (positive, negative),
    };

    let (ports, names) = split(&entity.ports);
    let (not_ports, not_names) = split(&entity.not_ports);
    let named_ports = |names: Vec<&Name>, needs: &mut Vec<Need>| -> Vec<SetId> {
        let selector = positive.as_ref().unwrap_or(match_all);
        let need = |name: &Name| {
            let (protocol_key, protocol) = protocol_key(protocol);
            let id = SetId::for_named_port(selector.id(), protocol_key, name);
            let source = SetSource::NamedPort { selector: Arc::clone(selector), protocol, port: Name::clone(name) };
            needs.push((id.clone(), source));
            id
        };
        names.into_iter().map(need).collect()
    };
    let mut by_selector = |selector: &Arc<Selector>| {
        let id = selector.id().clone();
        needs.push((id.clone(), SetSource::Selector(Arc::clone(selector))));
        id
    };

    // Named ports alone contain the restriction already.
    let only_named = ports.is_empty() && !names.is_empty();
    let sets = positive.iter().filter(|_| !only_named).map(&mut by_selector).collect();
    let not_sets = negative.iter().map(&mut by_selector).collect();
    SideProgram {
        nets: entity.nets,
        not_nets: entity.not_nets,
        sets,
        not_sets,
        named_port_sets: named_ports(names, needs),
        not_named_port_sets: named_ports(not_names, needs),
        ports,
        not_ports,
        address_port_sets: Vec::new(),
    }
}

/// Separates numbers from names.
fn split(ports: &[Port]) -> (Vec<PortRange>, Vec<&Name>) {
    let mut ranges = Vec::new();
    let mut names = Vec::new();
    for port in ports {
        match port {
            Port::Range(range) => ranges.push(*range),
            Port::Named(name) => names.push(name),
        }
    }
    (ranges, names)
}

/// Protocol of a named-port set, as it goes into the id and as a number.
fn protocol_key(protocol: Option<&Protocol>) -> (&'static str, Option<u8>) {
    match protocol.map(Protocol::number) {
        None => ("any", None),
        Some(Some(17)) => ("udp", Some(17)),
        Some(Some(132)) => ("sctp", Some(132)),
        Some(_) => ("tcp", Some(6)),
    }
}

#[cfg(test)]
mod tests {
    use model::Selector;
    use testkit::build;

    use super::*;

    /// The table of R-18 and the protocol keys of R-13.
    #[test]
    fn selectors_and_named_ports_become_sets_row_by_row() {
        let cases = [
            ("allow tcp", ""),
            ("allow tcp to has(p)", "s(has(p))"),
            ("allow tcp to has(p) to-ports 80", "s(has(p))"),
            ("allow tcp to has(p) to-ports http", "n(has(p),tcp,http)"),
            ("allow tcp to has(p) to-ports 80,http", "s(has(p)) + n(has(p),tcp,http)"),
            ("allow tcp to-ports http", "n(all(),tcp,http)"),
            ("allow tcp to-not has(n)", "not-s(has(n))"),
            ("allow tcp to-not has(n) to-ports http", "not-s(has(n)) + n(all(),tcp,http)"),
            ("allow tcp to has(p) to-not has(n) to-ports http", "n((has(p)) && (!(has(n))),tcp,http)"),
            ("allow tcp to has(p) to-not-ports http", "s(has(p)) + not-n(has(p),tcp,http)"),
            ("allow tcp to-not-ports http", "not-n(all(),tcp,http)"),
            (
                "allow tcp to has(p) to-not has(n) to-not-ports http",
                "s((has(p)) && (!(has(n)))) + not-n((has(p)) && (!(has(n))),tcp,http)",
            ),
            ("allow to-ports http", "n(all(),any,http)"),
            ("allow udp to-ports http", "n(all(),udp,http)"),
            ("allow protocol 17 to-ports http", "n(all(),udp,http)"),
            ("allow protocol 132 to-ports http", "n(all(),sctp,http)"),
            ("allow protocol udplite to-ports http", "n(all(),tcp,http)"),
            ("allow not-protocol 17 to-ports http", "n(all(),any,http)"),
        ];
        let all = Arc::new(Selector::all());
        for (text, expected) in cases {
            let mut needs = Vec::new();
            let stored = build::rule(text);
            let program = rule(stored.clone(), 3, &all, &mut needs);
            assert_eq!(program.index, 3);
            let side = &program.destination;
            let lists = [
                ("", &side.sets),
                ("not-", &side.not_sets),
                ("", &side.named_port_sets),
                ("not-", &side.not_named_port_sets),
            ];
            let got: Vec<String> =
                lists.into_iter().flat_map(|(sign, sets)| sets.iter().map(move |id| format!("{sign}{id}"))).collect();
            let expected: Vec<String> = expected.split(" + ").filter_map(described).collect();
            assert_eq!(got, expected, "{text}");
            let mut needed: Vec<String> = needs.iter().map(|(id, _)| id.to_string()).collect();
            let mut named: Vec<String> = got.iter().map(|id| id.trim_start_matches("not-").to_owned()).collect();
            needed.sort();
            named.sort();
            assert_eq!(needed, named, "{text}");
        }
    }

    /// `[not-]s(selector)` or `[not-]n(selector,protocol,name)` as an id.
    fn described(text: &str) -> Option<String> {
        let text = text.trim();
        let (sign, text) = text.strip_prefix("not-").map_or(("", text), |text| ("not-", text));
        let inside = text.get(2..text.len().checked_sub(1)?)?;
        let id = match text.chars().next()? {
            's' => build::selector(inside).id().clone(),
            'n' => {
                let mut parts = inside.rsplitn(3, ',');
                let (name, protocol, selector) = (parts.next()?, parts.next()?, parts.next()?);
                SetId::for_named_port(build::selector(selector).id(), protocol, name)
            }
            _ => return None,
        };
        Some(format!("{sign}{id}"))
    }

    #[test]
    fn nested_negations_keep_their_tree_when_merged() {
        // `!(!(x))` prints as `!!x`; its id is that of the tree and not of the text read again.
        let mut needs = Vec::new();
        let stored = build::rule("allow from has(a) from-not !(has(b))");
        let program = rule(stored.clone(), 0, &Arc::new(Selector::all()), &mut needs);
        assert_eq!(program.source.sets, [SetId::for_selector("(has(a) && !!has(b))")]);
    }

    #[test]
    fn services_are_sets_of_their_own() {
        let mut needs = Vec::new();
        let stored = build::rule("allow from has(x) from-service ns/web to-service /web");
        let program = rule(stored.clone(), 0, &Arc::new(Selector::all()), &mut needs);
        let selector = build::selector("has(x)").id().clone();
        assert_eq!(program.source.sets, [selector, SetId::for_service_addresses("ns", "web")]);
        assert_eq!(program.destination.address_port_sets, [SetId::for_service("", "web")]);
        assert!(program.destination.sets.is_empty());
    }
}
