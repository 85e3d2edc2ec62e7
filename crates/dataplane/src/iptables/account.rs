//! Whether a table of the nft variant can have changed since it was listed.
//!
//! Used by [`super::watch`]. Every transaction of anybody raises the generation of nf_tables by one, and each is told
//! to subscribers with its number and what it touched. So a table is proven to be as it was listed if the numbers heard
//! since then follow each other without a gap up to the present one, and none of them touched it (netfilter.md 16.11).
//!
//! Invariant: whatever is not quite clear (a number that is missing, messages that were lost, a listing during which
//! the number moved) proves nothing, and the table is read.

use std::collections::BTreeSet;

use program::Table;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Every transaction up to this one is in the listings of `untouched`, or was heard since.
    up_to: Option<u32>,
    /// Tables that were listed completely and not touched since.
    untouched: BTreeSet<Table>,
}

impl Account {
    /// A transaction was heard, ours or not.
    pub(super) fn heard(&mut self, generation: u32, touched: impl IntoIterator<Item = Table>) {
        for table in touched {
            self.untouched.remove(&table);
        }
        match self.up_to {
            Some(last) if generation == last.wrapping_add(1) => self.up_to = Some(generation),
            // Told only now, and in the listings already.
            Some(last) if generation <= last => {}
            Some(_) | None => {
                self.untouched.clear();
                self.up_to = Some(generation);
            }
        }
    }

    /// Something may have been done to the table.
    pub(super) fn touched(&mut self, table: Table) {
        self.untouched.remove(&table);
    }

    /// Something was not heard.
    pub(super) fn lost(&mut self) {
        *self = Self::default();
    }

    /// A table was listed completely, and before and after it this was the present generation.
    pub(super) fn listed(&mut self, table: Table, generation: u32) {
        if self.up_to != Some(generation) {
            self.untouched.clear();
            self.up_to = Some(generation);
        }
        self.untouched.insert(table);
    }

    /// Returns whether the table is as it was listed, given the present generation.
    pub(super) fn is_unchanged(&self, table: Table, generation: u32) -> bool {
        self.up_to == Some(generation) && self.untouched.contains(&table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILTER: Table = Table::Filter;
    const NAT: Table = Table::Nat;

    fn listed_at(generation: u32) -> Account {
        let mut account = Account::default();
        account.listed(FILTER, generation);
        account.listed(NAT, generation);
        account
    }

    #[test]
    fn a_table_is_unchanged_while_every_transaction_was_heard_and_none_touched_it() {
        let mut account = listed_at(7);
        assert!(account.is_unchanged(FILTER, 7));
        assert!(!account.is_unchanged(FILTER, 8), "one that was not heard");
        assert!(!account.is_unchanged(Table::Raw, 7), "never listed");
        account.heard(8, []);
        account.heard(9, [NAT]);
        assert!(account.is_unchanged(FILTER, 9));
        assert!(!account.is_unchanged(NAT, 9));
        account.touched(FILTER);
        assert!(!account.is_unchanged(FILTER, 9));
    }

    #[test]
    fn a_gap_proves_nothing_until_the_next_listing() {
        let mut account = listed_at(7);
        account.heard(9, []);
        assert!(!account.is_unchanged(FILTER, 9));
        account.listed(FILTER, 9);
        account.heard(10, []);
        assert!(account.is_unchanged(FILTER, 10));
        account.lost();
        assert!(!account.is_unchanged(FILTER, 10));
        account.heard(11, []);
        assert!(!account.is_unchanged(FILTER, 11));
    }

    #[test]
    fn what_is_told_late_is_in_the_listing_but_may_not_be_in_that_of_its_table() {
        let mut account = listed_at(7);
        account.heard(6, []);
        account.heard(7, [NAT]);
        assert!(account.is_unchanged(FILTER, 7));
        assert!(!account.is_unchanged(NAT, 7));
    }

    #[test]
    fn a_listing_of_another_generation_leaves_the_other_tables_without_proof() {
        let mut account = listed_at(7);
        account.listed(FILTER, 9);
        assert!(account.is_unchanged(FILTER, 9));
        assert!(!account.is_unchanged(NAT, 9));
        // One that was heard in between and is newer than the listing.
        let mut account = listed_at(7);
        account.heard(8, [FILTER]);
        account.listed(FILTER, 7);
        assert!(!account.is_unchanged(FILTER, 8));
    }

    #[test]
    fn numbers_begin_anew_without_a_proof() {
        let mut account = listed_at(u32::MAX);
        // The kernel leaves nought out.
        account.heard(1, []);
        assert!(!account.is_unchanged(FILTER, 1));
    }
}
