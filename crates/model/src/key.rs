//! Keys: of resources in etcd ([`ResourceKey`]) and of internal records (datastore.md 1.3, 1.4).

use std::fmt;

use crate::names::Name;

/// Kind of a policy, in the spelling of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    GlobalNetworkPolicy,
    KubernetesClusterNetworkPolicy,
    KubernetesNetworkPolicy,
    NetworkPolicy,
    StagedGlobalNetworkPolicy,
    StagedKubernetesNetworkPolicy,
    StagedNetworkPolicy,
}

impl PolicyKind {
    /// All kinds, in order.
    pub const ALL: [Self; 7] = [
        Self::GlobalNetworkPolicy,
        Self::KubernetesClusterNetworkPolicy,
        Self::KubernetesNetworkPolicy,
        Self::NetworkPolicy,
        Self::StagedGlobalNetworkPolicy,
        Self::StagedKubernetesNetworkPolicy,
        Self::StagedNetworkPolicy,
    ];

    /// The API's word, as it appears in comments and group identifiers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GlobalNetworkPolicy => "GlobalNetworkPolicy",
            Self::KubernetesClusterNetworkPolicy => "KubernetesClusterNetworkPolicy",
            Self::KubernetesNetworkPolicy => "KubernetesNetworkPolicy",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::StagedGlobalNetworkPolicy => "StagedGlobalNetworkPolicy",
            Self::StagedKubernetesNetworkPolicy => "StagedKubernetesNetworkPolicy",
            Self::StagedNetworkPolicy => "StagedNetworkPolicy",
        }
    }

    /// The short form used in chain names and log prefixes (netfilter.md 3.3).
    pub const fn short(self) -> &'static str {
        match self {
            Self::GlobalNetworkPolicy => "gnp",
            Self::KubernetesClusterNetworkPolicy => "kcnp",
            Self::KubernetesNetworkPolicy => "knp",
            Self::NetworkPolicy => "np",
            Self::StagedGlobalNetworkPolicy => "sgnp",
            Self::StagedKubernetesNetworkPolicy => "sknp",
            Self::StagedNetworkPolicy => "snp",
        }
    }

    /// Staged kinds decide nothing (policy.md T-20).
    pub const fn is_staged(self) -> bool {
        matches!(
            self,
            Self::StagedGlobalNetworkPolicy | Self::StagedKubernetesNetworkPolicy | Self::StagedNetworkPolicy
        )
    }
}

/// Identity of a policy. `Ord` is the tie-break order of policy.md T-5: the text `name/namespace/kind`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PolicyKey {
    pub kind: PolicyKind,
    /// Empty for global kinds.
    pub namespace: Name,
    pub name: Name,
}

impl PolicyKey {
    /// The bytes of the text that decides, from a place in its first part on.
    fn tie_break(&self, from: usize) -> impl Iterator<Item = u8> {
        let name = self.name.as_bytes().get(from..).unwrap_or_default();
        let parts = [name, b"/", self.namespace.as_bytes(), b"/", self.kind.as_str().as_bytes()];
        parts.into_iter().flatten().copied()
    }
}

impl Ord for PolicyKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let (a, b) = (self.name.as_bytes(), other.name.as_bytes());
        // Most names differ before the shorter one ends; policies are compared often.
        let common = a.len().min(b.len());
        let names = a.get(..common).cmp(&b.get(..common));
        names.then_with(|| self.tie_break(common).cmp(other.tie_break(common)))
    }
}

impl PartialOrd for PolicyKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// The variable part of chain names: `gnp/name` or `np/namespace/name` (netfilter.md 3.3).
impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{}/{}", self.kind.short(), self.name)
        } else {
            write!(f, "{}/{}/{}", self.kind.short(), self.namespace, self.name)
        }
    }
}

/// Identity of a workload endpoint. Its `Ord`, after the host, is the order in which endpoints win a
/// contested interface name (host.md 8.4).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadEndpointKey {
    pub host: Name,
    pub orchestrator: Name,
    /// `<namespace>/<workload>`.
    pub workload: Name,
    pub endpoint: Name,
}

/// Why the name of a stored workload endpoint names no endpoint (C-2).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadNameError {
    #[error("a workload endpoint needs a namespace")]
    NoNamespace,
    #[error("the name is shorter than the shortest possible one of {SHORTEST_WORKLOAD_NAME} bytes")]
    TooShort,
    #[error("the name has {0} parts where node, orchestrator, workload and endpoint make 4")]
    Parts(usize),
    #[error("the last part of the name is empty")]
    EmptyPart,
}

/// Longer names of endpoints are identifiers.
const LONGEST_COMMON_ENDPOINT: usize = 15;

/// Four parts of one byte and three dashes.
const SHORTEST_WORKLOAD_NAME: usize = 7;

impl WorkloadEndpointKey {
    /// Reads namespace and name of a stored workload endpoint (C-2).
    ///
    /// # Errors
    ///
    /// If the name is not made of four parts as C-1 makes them.
    pub fn from_resource_name(namespace: &str, name: &str) -> Result<Self, WorkloadNameError> {
        Self::parse(namespace, name, |part| part.into())
    }

    /// Like [`Self::from_resource_name`]; `recurring` makes the parts that many endpoints have in common.
    pub(crate) fn parse(
        namespace: &str,
        name: &str,
        mut recurring: impl FnMut(&str) -> Name,
    ) -> Result<Self, WorkloadNameError> {
        if namespace.is_empty() {
            return Err(WorkloadNameError::NoNamespace);
        }
        if name.len() < SHORTEST_WORKLOAD_NAME {
            return Err(WorkloadNameError::TooShort);
        }
        let parts = WorkloadName::parse(namespace, name);
        let [host, orchestrator, workload, endpoint] = parts.get()?;
        // What stands in the way of being one of many: `eth0` is what the plugin of Kubernetes says, OpenStack
        // gives the endpoint an identifier.
        let endpoint = if endpoint.len() <= LONGEST_COMMON_ENDPOINT { recurring(endpoint) } else { endpoint.into() };
        Ok(Self { host: recurring(host), orchestrator: recurring(orchestrator), workload: workload.into(), endpoint })
    }

    /// Returns the namespace: the workload up to its first slash.
    pub fn namespace(&self) -> &str {
        self.workload.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// Returns the workload without the namespace.
    pub fn workload_name(&self) -> &str {
        self.workload.split_once('/').map_or(&*self.workload, |(_, workload)| workload)
    }

    /// Returns the key under which the endpoint is stored (C-1).
    pub fn resource_key(&self) -> ResourceKey {
        let parts = [&*self.host, &*self.orchestrator, self.workload_name(), &*self.endpoint];
        let name = parts.map(|part| part.replace('-', "--")).join("-");
        ResourceKey::WorkloadEndpoint { namespace: self.namespace().into(), name: name.into() }
    }
}

/// The parts of the name of a stored workload endpoint, one behind the other, the third with the namespace before it.
struct WorkloadName {
    text: String,
    /// Where the first parts end.
    ends: [usize; 4],
    parts: usize,
}

impl WorkloadName {
    /// Splits at lone dashes from the second byte on; a doubled dash stands for one (C-2).
    fn parse<'n>(namespace: &str, name: &'n str) -> Self {
        let text = String::with_capacity(namespace.len() + 1 + name.len());
        let mut found = Self { text, ends: [0; 4], parts: 0 };
        // A part never begins with a dash, so a leading one cannot be a separator.
        let mut rest = match name.strip_prefix('-') {
            Some(rest) => {
                found.text.push('-');
                rest
            }
            None => name,
        };
        // A loop over bytes: parts are short, and searching them by a searcher costs more than it saves.
        let split = |text: &'n str| text.split_at_checked(text.bytes().position(|byte| byte == b'-')?);
        while let Some((before, after)) = split(rest) {
            let after = after.get(1..).unwrap_or_default();
            found.text.push_str(before);
            rest = match after.strip_prefix('-') {
                Some(after) => {
                    found.text.push('-');
                    after
                }
                None => {
                    found.end_part();
                    if found.parts == 2 {
                        found.text.push_str(namespace);
                        found.text.push('/');
                    }
                    after
                }
            };
        }
        found.text.push_str(rest);
        found.end_part();
        found
    }

    fn end_part(&mut self) {
        if let Some(end) = self.ends.get_mut(self.parts) {
            *end = self.text.len();
        }
        self.parts += 1;
    }

    fn get(&self) -> Result<[&str; 4], WorkloadNameError> {
        if self.parts != 4 {
            return Err(WorkloadNameError::Parts(self.parts));
        }
        let [a, b, c, d] = self.ends;
        let parts = [0..a, a..b, b..c, c..d].map(|part| self.text.get(part).unwrap_or_default());
        if parts[3].is_empty() { Err(WorkloadNameError::EmptyPart) } else { Ok(parts) }
    }
}

impl fmt::Display for WorkloadEndpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.host, self.orchestrator, self.workload, self.endpoint)
    }
}

/// What every key of a stored resource begins with.
pub const RESOURCES: &str = "/calico/resources/v3/projectcalico.org/";

/// Key of a stored v3 resource that the agent reads; every other key is none of its business.
///
/// Of the kinds of datastore.md 1.1 there are no staged policies, which decide nothing (C-25), and not yet
/// Node, `IPPool`, BGP resources and blocks. So the checks of Nodes (V-21) come with Nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKey {
    WorkloadEndpoint {
        namespace: Name,
        name: Name,
    },
    /// Only kinds that are stored under their own prefix and are not staged.
    Policy(PolicyKey),
    Tier(Name),
    Profile(Name),
    NetworkSet {
        namespace: Name,
        name: Name,
    },
    GlobalNetworkSet(Name),
    HostEndpoint(Name),
    ClusterInformation(Name),
    FelixConfiguration(Name),
}

impl ResourceKey {
    /// Reads a key of the datastore (K-1 to K-3). Names are taken verbatim.
    ///
    /// Returns `None` for everything that the agent does not read: other prefixes, other and staged
    /// kinds, and keys whose shape does not fit their kind.
    pub fn parse(key: &[u8]) -> Option<Self> {
        let (plural, name) = std::str::from_utf8(key).ok()?.strip_prefix(RESOURCES)?.split_once('/')?;
        Some(match plural {
            "workloadendpoints" => {
                let (namespace, name) = namespaced(name)?;
                Self::WorkloadEndpoint { namespace, name }
            }
            "networksets" => {
                let (namespace, name) = namespaced(name)?;
                Self::NetworkSet { namespace, name }
            }
            "networkpolicies" => {
                let (namespace, name) = namespaced(name)?;
                Self::Policy(PolicyKey { kind: PolicyKind::NetworkPolicy, namespace, name })
            }
            "globalnetworkpolicies" => Self::Policy(PolicyKey {
                kind: PolicyKind::GlobalNetworkPolicy,
                namespace: "".into(),
                name: segment(name)?,
            }),
            "tiers" => Self::Tier(segment(name)?),
            "profiles" => Self::Profile(segment(name)?),
            "globalnetworksets" => Self::GlobalNetworkSet(segment(name)?),
            "hostendpoints" => Self::HostEndpoint(segment(name)?),
            "clusterinformations" => Self::ClusterInformation(segment(name)?),
            "felixconfigurations" => Self::FelixConfiguration(segment(name)?),
            _ => return None,
        })
    }

    /// Returns plural word, namespace (empty if the kind has none) and name.
    fn parts(&self) -> (&'static str, &str, &str) {
        match self {
            Self::WorkloadEndpoint { namespace, name } => ("workloadendpoints", namespace, name),
            Self::Policy(PolicyKey { kind, namespace, name }) => (policy_plural(*kind), namespace, name),
            Self::Tier(name) => ("tiers", "", name),
            Self::Profile(name) => ("profiles", "", name),
            Self::NetworkSet { namespace, name } => ("networksets", namespace, name),
            Self::GlobalNetworkSet(name) => ("globalnetworksets", "", name),
            Self::HostEndpoint(name) => ("hostendpoints", "", name),
            Self::ClusterInformation(name) => ("clusterinformations", "", name),
            Self::FelixConfiguration(name) => ("felixconfigurations", "", name),
        }
    }
}

/// The path in the datastore; [`ResourceKey::parse`] reads it back.
impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (plural, namespace, name) = self.parts();
        if namespace.is_empty() {
            write!(f, "{RESOURCES}{plural}/{name}")
        } else {
            write!(f, "{RESOURCES}{plural}/{namespace}/{name}")
        }
    }
}

const fn policy_plural(kind: PolicyKind) -> &'static str {
    match kind {
        PolicyKind::GlobalNetworkPolicy => "globalnetworkpolicies",
        PolicyKind::KubernetesClusterNetworkPolicy => "kubernetesclusternetworkpolicies",
        PolicyKind::KubernetesNetworkPolicy => "kubernetesnetworkpolicies",
        PolicyKind::NetworkPolicy => "networkpolicies",
        PolicyKind::StagedGlobalNetworkPolicy => "stagedglobalnetworkpolicies",
        PolicyKind::StagedKubernetesNetworkPolicy => "stagedkubernetesnetworkpolicies",
        PolicyKind::StagedNetworkPolicy => "stagednetworkpolicies",
    }
}

/// Returns namespace and name if the key is that of a workload endpoint (K-1 to K-3).
pub(crate) fn workload_endpoint(key: &[u8]) -> Option<(&str, &str)> {
    let key = key.strip_prefix(RESOURCES.as_bytes())?.strip_prefix(b"workloadendpoints/")?;
    two_segments(std::str::from_utf8(key).ok()?)
}

/// Exactly one path segment, not empty (K-2).
fn segment(text: &str) -> Option<Name> {
    (!text.is_empty() && !text.contains('/')).then(|| text.into())
}

/// Exactly two path segments, neither empty: an object of a namespaced kind without a namespace would
/// lose the restriction to it (H-4).
fn two_segments(text: &str) -> Option<(&str, &str)> {
    let (namespace, name) = text.split_once('/')?;
    (!namespace.is_empty() && !name.is_empty() && !name.contains('/')).then_some((namespace, name))
}

fn namespaced(text: &str) -> Option<(Name, Name)> {
    two_segments(text).map(|(namespace, name)| (namespace.into(), name.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_that_are_read_are_parsed_and_printed_back() {
        for (key, wanted) in [
            (
                "workloadendpoints/openstack/a-b-c-d",
                ResourceKey::WorkloadEndpoint { namespace: "openstack".into(), name: "a-b-c-d".into() },
            ),
            ("networkpolicies/ns/knp.default.x", policy(PolicyKind::NetworkPolicy, "ns", "knp.default.x")),
            ("globalnetworkpolicies/default.foo", policy(PolicyKind::GlobalNetworkPolicy, "", "default.foo")),
            ("tiers/default", ResourceKey::Tier("default".into())),
            ("profiles/kns.default", ResourceKey::Profile("kns.default".into())),
            ("networksets/ns/a", ResourceKey::NetworkSet { namespace: "ns".into(), name: "a".into() }),
            ("globalnetworksets/a", ResourceKey::GlobalNetworkSet("a".into())),
            ("hostendpoints/compute-1-eth0", ResourceKey::HostEndpoint("compute-1-eth0".into())),
            ("clusterinformations/default", ResourceKey::ClusterInformation("default".into())),
            ("felixconfigurations/node.a%2fb", ResourceKey::FelixConfiguration("node.a%2fb".into())),
        ] {
            let key = format!("{RESOURCES}{key}");
            assert_eq!(ResourceKey::parse(key.as_bytes()), Some(wanted.clone()), "{key}");
            assert_eq!(wanted.to_string(), key);
        }
    }

    #[test]
    fn other_keys_are_none_of_our_business() {
        for key in [
            "tiers/",
            "tiers",
            "tiers/a/b",
            "networkpolicies/a",
            "networkpolicies/a/",
            "networkpolicies//a",
            "networkpolicies/a/b/c",
            "hostendpoints/",
            "hostendpoints/ns/a",
            "stagednetworkpolicies/a/b",
            "stagedglobalnetworkpolicies/a",
            "stagedkubernetesnetworkpolicies/a/b",
            "nodes/a",
            "Tiers/a",
            "",
            "/",
        ] {
            let key = format!("{RESOURCES}{key}");
            assert_eq!(ResourceKey::parse(key.as_bytes()), None, "{key}");
        }
        for key in ["", "/calico/v1/Ready", "calico/resources/v3/projectcalico.org/tiers/a", "/calico/ipam/v2/config"] {
            assert_eq!(ResourceKey::parse(key.as_bytes()), None, "{key}");
        }
        let not_text = [RESOURCES.as_bytes(), b"tiers/\xff"].concat();
        assert_eq!(ResourceKey::parse(&not_text), None);
    }

    #[test]
    fn names_of_workload_endpoints_are_taken_apart_and_put_together() {
        for (name, host, orchestrator, workload, endpoint) in [
            ("compute--1-openstack-7e3d--11-ab--cd", "compute-1", "openstack", "openstack/7e3d-11", "ab-cd"),
            ("a-b-c-d", "a", "b", "openstack/c", "d"),
            ("a----b-b-c-d", "a--b", "b", "openstack/c", "d"),
            ("ö-b-c-d", "ö", "b", "openstack/c", "d"),
        ] {
            let key = WorkloadEndpointKey::from_resource_name("openstack", name).unwrap();
            assert_eq!(
                (&*key.host, &*key.orchestrator, &*key.workload, &*key.endpoint),
                (host, orchestrator, workload, endpoint)
            );
            let stored = ResourceKey::WorkloadEndpoint { namespace: "openstack".into(), name: name.into() };
            assert_eq!(key.resource_key(), stored);
        }
    }

    #[test]
    fn names_that_do_not_give_four_parts_name_no_endpoint() {
        for (namespace, name, wanted) in [
            ("", "a-b-c-d", WorkloadNameError::NoNamespace),
            ("n", "a-b-c-", WorkloadNameError::TooShort),
            ("n", "aaa-b-c", WorkloadNameError::Parts(3)),
            ("n", "a-b-c-d-e", WorkloadNameError::Parts(5)),
            ("n", "a--b-c-d", WorkloadNameError::Parts(3)),
            ("n", "aa-b-c-", WorkloadNameError::EmptyPart),
        ] {
            assert_eq!(WorkloadEndpointKey::from_resource_name(namespace, name), Err(wanted), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(key in prop::collection::vec(any::<u8>(), 0..80), name in "\\PC*") {
            ResourceKey::parse(&key);
            ResourceKey::parse(&[RESOURCES.as_bytes(), &key].concat());
            let _result: Result<_, WorkloadNameError> = WorkloadEndpointKey::from_resource_name("n", &name);
        }

        #[test]
        fn names_are_split_as_character_by_character(name in "[ab-]{0,20}|[-aöé/]{5,12}", namespace in "n?") {
            let found = WorkloadEndpointKey::from_resource_name(&namespace, &name);
            let parts = parts_by_character(&name);
            let wanted = match parts.as_slice() {
                _ if namespace.is_empty() => Err(WorkloadNameError::NoNamespace),
                _ if name.len() < SHORTEST_WORKLOAD_NAME => Err(WorkloadNameError::TooShort),
                [_, _, _, endpoint] if endpoint.is_empty() => Err(WorkloadNameError::EmptyPart),
                [host, orchestrator, workload, endpoint] => Ok(WorkloadEndpointKey {
                    host: host.as_str().into(),
                    orchestrator: orchestrator.as_str().into(),
                    workload: format!("n/{workload}").into(),
                    endpoint: endpoint.as_str().into(),
                }),
                _ => Err(WorkloadNameError::Parts(parts.len())),
            };
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn the_short_way_to_the_key_of_an_endpoint_is_the_long_way(
            key in "(workloadendpoints/|tiers/)?[a/]{0,8}", bytes in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            for key in [format!("{RESOURCES}{key}").into_bytes(), [key.as_bytes(), &bytes].concat(),
                [RESOURCES.as_bytes(), key.as_bytes(), &bytes].concat()]
            {
                let long = match ResourceKey::parse(&key) {
                    Some(ResourceKey::WorkloadEndpoint { namespace, name }) => Some((namespace, name)),
                    _ => None,
                };
                let short = workload_endpoint(&key).map(|(namespace, name)| (namespace.into(), name.into()));
                prop_assert_eq!(short, long);
            }
        }

        #[test]
        fn parts_survive_the_round_trip(parts in prop::collection::vec("[a-z.](-{0,2}[a-z0-9.])*", 4)) {
            let key = WorkloadEndpointKey {
                host: parts[0].as_str().into(),
                orchestrator: parts[1].as_str().into(),
                workload: format!("n/{}", parts[2]).into(),
                endpoint: parts[3].as_str().into(),
            };
            let ResourceKey::WorkloadEndpoint { namespace, name } = key.resource_key() else { panic!() };
            prop_assert_eq!(WorkloadEndpointKey::from_resource_name(&namespace, &name), Ok(key));
        }
    }

    /// Splits at lone dashes from the second character on; a doubled dash stands for one (C-2).
    fn parts_by_character(name: &str) -> Vec<String> {
        let mut parts = Vec::new();
        let mut part = String::new();
        let mut chars = name.chars().peekable();
        part.extend(chars.next());
        while let Some(c) = chars.next() {
            if c == '-' && chars.next_if_eq(&'-').is_none() {
                parts.push(std::mem::take(&mut part));
            } else {
                part.push(c);
            }
        }
        parts.push(part);
        parts
    }

    fn policy(kind: PolicyKind, namespace: &str, name: &str) -> ResourceKey {
        ResourceKey::Policy(PolicyKey { kind, namespace: namespace.into(), name: name.into() })
    }
}
