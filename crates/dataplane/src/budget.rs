//! How much of the processor reads in the background may take (U5.b).
//!
//! Used by the apply loop. A read that took a time may be followed by the next one, of whatever table, only after
//! fifty times that: two hundredths of one core on average. The period of the refresh stretches accordingly.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use program::TableId;
use tracing::{info, warn};

/// Time between the starts of two reads, as a multiple of what the first one cost.
const SHARE: u32 = 50;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct SweepBudget {
    free_at: Option<Instant>,
    /// What the last read of each table cost.
    costs: BTreeMap<TableId, Duration>,
    stretched: bool,
}

impl SweepBudget {
    /// When a read that is due at `due` may begin.
    pub(crate) fn allows(&self, due: Instant) -> Instant {
        self.free_at.map_or(due, |free_at| free_at.max(due))
    }

    /// A read begins. It counts for what the last one cost even if it is broken off.
    pub(crate) fn begins(&mut self, table: TableId, now: Instant) {
        self.free_at = Some(now + self.costs.get(&table).copied().unwrap_or_default() * SHARE);
    }

    /// A read that began at `began` is done. Tables are to be read every `period`.
    pub(crate) fn done(&mut self, table: TableId, began: Instant, cost: Duration, period: Option<Duration>) {
        self.costs.insert(table, cost);
        self.free_at = Some(began + cost * SHARE);
        let needed = self.costs.values().sum::<Duration>() * SHARE;
        let stretched = period.is_some_and(|period| needed > period);
        if stretched && !self.stretched {
            warn!(?period, stretched_to = ?needed, "reading the tables costs too much to do it as often as configured");
        } else if self.stretched && !stretched {
            info!(?period, "the tables are read as often as configured again");
        }
        self.stretched = stretched;
    }

    /// Returns whether tables are read less often than configured.
    pub(crate) fn is_stretched(&self) -> bool {
        self.stretched
    }
}

#[cfg(test)]
mod tests {
    use model::Family;
    use program::Table;

    use super::*;

    #[test]
    fn reads_take_two_hundredths_of_the_time_and_the_period_stretches() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let table = |table| TableId { family: Family::V4, table };
        let mut budget = SweepBudget::default();
        assert_eq!(budget.allows(start), start);
        budget.begins(table(Table::Filter), start);
        assert_eq!(budget.allows(start), start);
        budget.done(table(Table::Filter), start, ms(1000), Some(ms(90_000)));
        assert_eq!(budget.allows(start), start + ms(50_000));
        assert_eq!(budget.allows(start + ms(80_000)), start + ms(80_000));
        assert!(!budget.is_stretched());
        // One that is broken off counts as well.
        let second = start + ms(80_000);
        budget.begins(table(Table::Filter), second);
        assert_eq!(budget.allows(second), second + ms(50_000));
        budget.done(table(Table::Nat), second, ms(900), Some(ms(90_000)));
        assert!(budget.is_stretched());
        budget.done(table(Table::Filter), second, ms(100), Some(ms(90_000)));
        assert!(!budget.is_stretched());
    }
}
