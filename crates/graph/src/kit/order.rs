//! Sorting of numbers that lie close together.

/// Brings numbers into order, each once.
///
/// Most often they are in order already. Many among few more are set as bits and read again, which is
/// several times faster than comparing them.
pub(crate) fn sort_numbers(numbers: &mut Vec<u32>) {
    if numbers.is_sorted_by(|a, b| a < b) {
        return;
    }
    let (first, last) = numbers.iter().fold((u32::MAX, 0), |(first, last), n| (first.min(*n), last.max(*n)));
    let range = last.saturating_sub(first) as usize;
    if range / 16 > numbers.len() {
        numbers.sort_unstable();
        numbers.dedup();
        return;
    }
    let mut words = vec![0u64; range / 64 + 1];
    for number in numbers.drain(..) {
        let number = number - first;
        if let Some(word) = words.get_mut(number as usize / 64) {
            *word |= 1 << (number % 64);
        }
    }
    for (start, word) in (first..=last).step_by(64).zip(words) {
        let mut rest = word;
        while rest != 0 {
            numbers.push(start + rest.trailing_zeros());
            rest &= rest - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn numbers_come_out_in_order_and_each_once(
            mut numbers in (prop_oneof![Just(2u32), Just(130), Just(5_000), Just(u32::MAX)], any::<u32>())
                .prop_flat_map(|(range, first)| {
                    let first = first.min(u32::MAX - range);
                    prop::collection::vec(first..=first + range, 0..200)
                }),
        ) {
            let expected: BTreeSet<u32> = numbers.iter().copied().collect();
            sort_numbers(&mut numbers);
            prop_assert!(numbers.iter().eq(&expected));
        }
    }
}
