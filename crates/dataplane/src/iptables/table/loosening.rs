//! Whether waiting changes of a table let through more than the rules in force (netfilter.md 19.2).

use program::{Action, Rule};

use super::TableDriver;

impl TableDriver {
    /// Returns whether the waiting changes let through packets that the rules in force do not, as far as a
    /// look at the single rules tells: an action that accepts or marks is new, or one that drops goes away.
    /// Such changes of a table that comes before the filter wait for the filter (netfilter.md 19.2).
    pub fn loosens(&self) -> bool {
        self.dirty.iter().any(|name| {
            let old = self.previous.get(name).map(|chain| chain.rules.as_slice());
            if old.is_none() && !self.settled_once {
                return false;
            }
            let old = old.unwrap_or_default();
            let new = self.chains.get(name).map(|wanted| wanted.chain.rules.as_slice()).unwrap_or_default();
            new.iter().any(|rule| admits(rule) && !old.contains(rule))
                || old.iter().any(|rule| rejects(rule) && !new.contains(rule))
        })
    }
}

/// Whether the rule lets packets through or marks them for others to do so.
fn admits(rule: &Rule) -> bool {
    match &rule.action {
        Some(
            Action::Accept
            | Action::Return
            | Action::SetMark(_)
            | Action::SetMaskedMark { .. }
            | Action::NoTrack
            | Action::MarkWithinRate { .. },
        ) => true,
        Some(
            Action::Drop
            | Action::Reject
            | Action::Jump(_)
            | Action::Goto(_)
            | Action::ClearMark(_)
            | Action::Log { .. }
            | Action::NfLog { .. }
            | Action::RejectConnectionsAbove(_)
            | Action::Dnat { .. }
            | Action::Snat { .. }
            | Action::Masquerade { .. }
            | Action::Dscp(_),
        )
        | None => false,
    }
}

/// Whether the rule stops packets, now or by taking back a mark.
fn rejects(rule: &Rule) -> bool {
    matches!(
        rule.action,
        Some(Action::Drop | Action::Reject | Action::ClearMark(_) | Action::RejectConnectionsAbove(_))
    )
}
