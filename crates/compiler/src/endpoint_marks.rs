//! Numbers of endpoints as packet marks (netfilter.md 2.2, IPVS only).
//!
//! Invariant: no two interfaces have one mark. An interface keeps its mark for as long as it has an
//! endpoint, because packets on their way carry it; so which mark it is may depend on what was there
//! before.

use std::collections::{BTreeMap, BTreeSet};

use model::Name;

use crate::marks::Marks;

/// See the [module documentation](self).
#[derive(Debug)]
pub struct EndpointMarks {
    mask: u32,
    by_interface: BTreeMap<Name, u32>,
    taken: BTreeSet<u32>,
}

impl EndpointMarks {
    pub fn new(marks: &Marks) -> Self {
        Self { mask: marks.endpoint, by_interface: BTreeMap::new(), taken: BTreeSet::from([marks.non_cali]) }
    }

    /// Returns the mark of an interface, giving it one if it has none. `None` if all are taken.
    pub fn allocate(&mut self, interface: &Name) -> Option<u32> {
        if let Some(mark) = self.by_interface.get(interface) {
            return Some(*mark);
        }
        let count = 1_u64.checked_shl(self.mask.count_ones())?;
        let start = u64::from(fnv1(interface));
        let mark = (0..count)
            .map(|step| (start + step) % count)
            .filter(|number| *number != 0)
            .map(|number| spread(number, self.mask))
            .find(|mark| !self.taken.contains(mark))?;
        self.taken.insert(mark);
        self.by_interface.insert(Name::clone(interface), mark);
        Some(mark)
    }

    pub fn get(&self, interface: &str) -> Option<u32> {
        self.by_interface.get(interface).copied()
    }

    pub fn release(&mut self, interface: &str) {
        if let Some(mark) = self.by_interface.remove(interface) {
            self.taken.remove(&mark);
        }
    }
}

/// FNV-1 with 32 bits: multiply, then xor.
fn fnv1(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5_u32, |hash, byte| hash.wrapping_mul(0x0100_0193) ^ u32::from(byte))
}

/// Puts bit k of a number where the mask has its k-th bit.
fn spread(number: u64, mask: u32) -> u32 {
    let positions = (0..u32::BITS).filter(|position| mask & (1 << position) != 0);
    positions.enumerate().filter(|(k, _)| number & (1 << k) != 0).fold(0, |mark, (_, position)| mark | (1 << position))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_keeps_its_mark_and_nobody_else_gets_it() {
        let mut marks = EndpointMarks::new(&Marks::default());
        let eth1: Name = "eth1".into();
        // `eth0` and `eth1` are neighbours in the hash.
        assert_eq!(marks.allocate(&"eth0".into()), Some(0xf440_0000));
        assert_eq!(marks.allocate(&eth1), Some(0xf460_0000));
        assert_eq!(marks.allocate(&eth1), Some(0xf460_0000));
        marks.release("eth1");
        assert_eq!(marks.get("eth1"), None);
        assert_eq!(marks.allocate(&eth1), Some(0xf460_0000));
    }

    #[test]
    fn without_a_free_mark_an_interface_gets_none() {
        // Two bits: 0 is no mark and one is taken by "not ours".
        let mut marks = EndpointMarks::new(&Marks { endpoint: 0x30_0000, non_cali: 0x10_0000, ..Marks::default() });
        let mut got: Vec<_> = ["a", "b"].map(|name| marks.allocate(&name.into())).into();
        got.sort();
        assert_eq!(got, [Some(0x20_0000), Some(0x30_0000)]);
        assert_eq!(marks.allocate(&"c".into()), None);
        let mut none = EndpointMarks::new(&Marks { endpoint: 0, non_cali: 0, ..Marks::default() });
        assert_eq!(none.allocate(&"a".into()), None);
    }
}
