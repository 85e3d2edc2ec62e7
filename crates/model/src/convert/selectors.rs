//! Combining the selectors of policies and rules with namespaces and service accounts (datastore.md
//! section 4).
//!
//! The combinations are made as text and parsed again, because that is how they are defined: replacing
//! `all()` acts on the whole text, quoted values included (C-61).

use std::sync::Arc;

use super::complaint::{At, Complaints};
use crate::intern::Pool;
use crate::names::Name;
use crate::selector::Selector;
use crate::v3::policy::{EntityRule, PolicySpec, ServiceAccounts};

const NAMESPACE_PREFIX: &str = "pcns.";
const SERVICE_ACCOUNT_PREFIX: &str = "pcsa.";
const HAS_NAMESPACE: &str = "has(projectcalico.org/namespace)";
const HAS_SERVICE_ACCOUNT: &str = "has(projectcalico.org/serviceaccount)";

/// Parses the selectors of one document; equal texts give the same object, in all documents.
#[derive(Debug)]
pub(super) struct Selectors<'p> {
    pool: &'p mut Pool,
}

impl<'p> Selectors<'p> {
    pub(super) fn new(pool: &'p mut Pool) -> Self {
        Self { pool }
    }

    pub(super) fn name(&mut self, text: &str) -> Name {
        self.pool.name(text)
    }

    /// Parses a text or rejects the record.
    fn parse_or_reject(&mut self, text: &str, at: At<'_>, complaints: &mut Complaints) -> Option<Arc<Selector>> {
        match self.pool.selector(text) {
            Ok(selector) => Some(selector),
            Err(error) => {
                complaints.reject(at, format_args!("{text:?} is not a selector: {error}"));
                None
            }
        }
    }

    /// Returns the canonical text with prefixed names, or rejects the record (H-2).
    fn canonical(&mut self, text: &str, prefix: &str, at: At<'_>, complaints: &mut Complaints) -> Option<String> {
        Some(self.parse_or_reject(text, at, complaints)?.prefixed(prefix))
    }

    /// Returns the selector of a namespaced policy (C-60).
    pub(super) fn of_network_policy(
        &mut self,
        spec: &PolicySpec<'_>,
        namespace: &str,
        at: At<'_>,
        complaints: &mut Complaints,
    ) -> Option<Arc<Selector>> {
        let at_selector = at.field("selector");
        let mut text = namespace_test(namespace);
        if !spec.selector.is_empty() {
            // By itself too: a text that closes our bracket and opens its own would escape from it.
            self.parse_or_reject(&spec.selector, at_selector, complaints)?;
            text = format!("({}) && {text}", spec.selector);
        }
        if !spec.service_account_selector.is_empty() {
            let at = at.field("serviceAccountSelector");
            let accounts = self.canonical(&spec.service_account_selector, SERVICE_ACCOUNT_PREFIX, at, complaints)?;
            text = format!("({text}) && {accounts}");
        }
        self.parse_or_reject(&text, at_selector, complaints)
    }

    /// Returns the selector of a global policy (C-61).
    pub(super) fn of_global_policy(
        &mut self,
        spec: &PolicySpec<'_>,
        at: At<'_>,
        complaints: &mut Complaints,
    ) -> Option<Arc<Selector>> {
        let at_selector = at.field("selector");
        self.parse_or_reject(&spec.selector, at_selector, complaints)?;
        let mut text = spec.selector.to_string();
        for (field, selector, prefix, has) in [
            ("namespaceSelector", &spec.namespace_selector, NAMESPACE_PREFIX, HAS_NAMESPACE),
            ("serviceAccountSelector", &spec.service_account_selector, SERVICE_ACCOUNT_PREFIX, HAS_SERVICE_ACCOUNT),
        ] {
            if selector.is_empty() {
                continue;
            }
            let selector = self.canonical(selector, prefix, at.field(field), complaints)?;
            text = if text.is_empty() { selector } else { format!("({text}) && {selector}") };
            text = text.replace("all()", has);
        }
        self.parse_or_reject(&text, at_selector, complaints)
    }

    /// Returns the positive selector of one side of a rule, if it has one (C-62 to C-65). `namespace` is
    /// that of the policy, empty for global policies and profiles.
    pub(super) fn of_entity(
        &mut self,
        entity: &EntityRule<'_>,
        namespace: &str,
        at: At<'_>,
        complaints: &mut Complaints,
    ) -> Option<Arc<Selector>> {
        let at_selector = at.field("selector");
        if !entity.selector.is_empty() {
            self.parse_or_reject(&entity.selector, at_selector, complaints)?;
        }
        let mut own = String::new();
        if let Some(accounts) = &entity.service_accounts {
            own = self.of_service_accounts(accounts, at.field("serviceAccounts"), complaints)?;
        }
        if own.is_empty() {
            own.push_str(&entity.selector);
        } else if !entity.selector.is_empty() {
            own = format!("({own}) && ({})", entity.selector);
        }
        let mut within = String::new();
        if !entity.namespace_selector.is_empty() {
            let at = at.field("namespaceSelector");
            let canonical = self.canonical(&entity.namespace_selector, NAMESPACE_PREFIX, at, complaints)?;
            within = canonical.replace("all()", HAS_NAMESPACE).replace("global()", &format!("!{HAS_NAMESPACE}"));
        } else if !namespace.is_empty() {
            within = namespace_test(namespace);
        }
        // A rule of a namespaced policy is tied to the namespace as soon as it uses any selector.
        let uses_selectors =
            !own.is_empty() || !entity.not_selector.is_empty() || !entity.namespace_selector.is_empty();
        let text = match (within.is_empty() || !uses_selectors, own.is_empty()) {
            (true, _) => own,
            (false, true) => within,
            (false, false) => format!("({within}) && ({own})"),
        };
        if text.is_empty() { None } else { self.parse_or_reject(&text, at_selector, complaints) }
    }

    /// Returns the negative selector of one side of a rule, if it has one (C-66).
    pub(super) fn of_exclusion(
        &mut self,
        entity: &EntityRule<'_>,
        at: At<'_>,
        complaints: &mut Complaints,
    ) -> Option<Arc<Selector>> {
        if entity.not_selector.is_empty() {
            return None;
        }
        self.parse_or_reject(&entity.not_selector, at.field("notSelector"), complaints)
    }

    /// C-63. Empty if there is nothing to restrict, `None` if the record was rejected.
    fn of_service_accounts(
        &mut self,
        accounts: &ServiceAccounts<'_>,
        at: At<'_>,
        complaints: &mut Complaints,
    ) -> Option<String> {
        let mut by_label = String::new();
        if !accounts.selector.is_empty() {
            by_label = self.canonical(&accounts.selector, SERVICE_ACCOUNT_PREFIX, at.field("selector"), complaints)?;
        }
        if accounts.names.is_empty() {
            return Some(by_label);
        }
        let at_names = at.field("names");
        // Names stand between these quotes; one that holds them could say anything.
        if let Some(name) = accounts.names.iter().find(|name| name.contains('\'')) {
            complaints.reject(at_names, format_args!("{name:?} cannot be the name of a service account"));
            return None;
        }
        let names: Vec<&str> = accounts.names.iter().map(|name| &**name).collect();
        let set = format!("projectcalico.org/serviceaccount in {{ '{}' }}", names.join("', '"));
        let by_name = self.canonical(&set, "", at_names, complaints)?;
        Some(if by_label.is_empty() { by_name } else { format!("({by_label}) && ({by_name})") })
    }
}

fn namespace_test(namespace: &str) -> String {
    format!("projectcalico.org/namespace == '{namespace}'")
}
