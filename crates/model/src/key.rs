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
    fn tie_break(&self) -> impl Iterator<Item = u8> {
        let parts = [self.name.as_bytes(), b"/", self.namespace.as_bytes(), b"/", self.kind.as_str().as_bytes()];
        parts.into_iter().flatten().copied()
    }
}

impl Ord for PolicyKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.tie_break().cmp(other.tie_break())
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

impl fmt::Display for WorkloadEndpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.host, self.orchestrator, self.workload, self.endpoint)
    }
}

/// Key of a stored v3 resource that the agent reads. To be filled by the parser (K-1 to K-6).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKey {
    WorkloadEndpoint { namespace: Name, name: Name },
    Policy(PolicyKey),
    Tier(Name),
    Profile(Name),
    NetworkSet { namespace: Name, name: Name },
    GlobalNetworkSet(Name),
    ClusterInformation(Name),
    FelixConfiguration(Name),
}
