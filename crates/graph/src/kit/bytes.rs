//! Byte strings behind four-byte handles.

/// Bytes of a page. A handle counts units of eight bytes, so that 22 of its bits number pages.
const PAGE: usize = 8192;
const UNIT: usize = 8;
const UNITS: u32 = (PAGE / UNIT) as u32;

/// Longer blocks are pages of their own.
const LARGEST: usize = 1024;
/// Block sizes grow by one unit up to here and by four units from here to [`LARGEST`].
const SMALL: usize = 256;
const STEP: usize = 4 * UNIT;
const CLASSES: usize = SMALL / UNIT + (LARGEST - SMALL) / STEP;

/// Marks the end of a list of blocks and of a list of pages.
const NO_BLOCK: u16 = u16::MAX;
const NO_PAGE: u32 = u32::MAX;

/// Byte strings that are stored once and named by number.
///
/// A string lies in a block with its length in front; a page holds blocks of one size. What is freed is
/// used again by strings of about the same length, a page without strings is given back, and after the
/// last string nothing is left.
///
/// Law: *get(insert(bytes)) = bytes, until remove*.
#[derive(Debug)]
pub(crate) struct Bytes {
    pages: Vec<Page>,
    /// By class: the first of the pages that have room.
    roomy: [u32; CLASSES],
    /// The first of the page numbers that stand for nothing.
    vacant: u32,
    count: usize,
}

/// Invariant: on the list of its class exactly while a block is free.
#[derive(Debug)]
struct Page {
    data: Box<[u8]>,
    /// Of the free blocks, each of which says where the next one is.
    free: u16,
    /// Blocks that have ever been used; those behind are free too.
    used: u16,
    live: u16,
    class: Class,
    before: u32,
    after: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Shared(u8),
    /// One string, as large as it must be.
    Alone,
}

impl Default for Bytes {
    fn default() -> Self {
        Self { pages: Vec::new(), roomy: [NO_PAGE; CLASSES], vacant: NO_PAGE, count: 0 }
    }
}

impl Class {
    fn of(size: usize) -> Self {
        let number = if size <= SMALL {
            size.div_ceil(UNIT).max(1) - 1
        } else if size <= LARGEST {
            SMALL / UNIT + (size - SMALL).div_ceil(STEP) - 1
        } else {
            return Self::Alone;
        };
        Self::Shared(number as u8)
    }

    /// Bytes of a block; `None` if it is a page.
    fn block(self) -> Option<usize> {
        let Self::Shared(number) = self else { return None };
        let number = usize::from(number) + 1;
        Some(number.min(SMALL / UNIT) * UNIT + number.saturating_sub(SMALL / UNIT) * STEP)
    }
}

impl Bytes {
    /// Stores a string and returns its handle.
    pub(crate) fn insert(&mut self, bytes: &[u8]) -> u32 {
        let (prefix, width) = length_prefix(bytes.len());
        let size = width + bytes.len();
        let class = Class::of(size);
        let (page, unit) = match class {
            Class::Shared(number) => self.take_block(number, class),
            Class::Alone => (self.add_page(class, size), 0),
        };
        self.count += 1;
        let start = unit as usize * UNIT;
        let place = self.pages.get_mut(page as usize).and_then(|page| page.data.get_mut(start..start + size));
        debug_assert!(place.is_some(), "a block outside its page");
        if let Some((front, back)) = place.and_then(|place| place.split_at_mut_checked(width)) {
            front.iter_mut().zip(prefix).for_each(|(to, from)| *to = from);
            back.copy_from_slice(bytes);
        }
        page * UNITS + unit
    }

    /// Returns a string that is stored.
    pub(crate) fn get(&self, handle: u32) -> &[u8] {
        let found = self.pages.get((handle / UNITS) as usize).and_then(|page| {
            let block = page.data.get((handle % UNITS) as usize * UNIT..)?;
            let (length, width) = read_length(block)?;
            block.get(width..width + length)
        });
        debug_assert!(found.is_some(), "a handle that stands for nothing");
        found.unwrap_or_default()
    }

    /// Stores another string in the place of one, and returns its handle, often the same.
    #[allow(dead_code, reason = "for the objects of `members`")]
    pub(crate) fn replace(&mut self, handle: u32, bytes: &[u8]) -> u32 {
        if self.get(handle) == bytes {
            return handle;
        }
        self.remove(handle);
        self.insert(bytes)
    }

    /// Forgets a string; its handle may be given to another.
    pub(crate) fn remove(&mut self, handle: u32) {
        let (number, unit) = (handle / UNITS, handle % UNITS);
        let Some(page) = self.pages.get_mut(number as usize).filter(|page| page.live > 0) else {
            debug_assert!(false, "removed what was not stored");
            return;
        };
        self.count -= 1;
        page.live -= 1;
        if self.count == 0 {
            *self = Self::default();
            return;
        }
        let Class::Shared(class) = page.class else {
            self.drop_page(number);
            return;
        };
        let was_full = !page.has_room();
        page.free_block(unit);
        let is_empty = page.live == 0;
        if was_full {
            self.link(class, number);
        }
        // One page stays for what comes next, so that churn does not allocate at every step.
        let is_only = self.roomy.get(usize::from(class)) == Some(&number)
            && self.pages.get(number as usize).is_some_and(|page| page.after == NO_PAGE);
        if is_empty && !is_only {
            self.unlink(class, number);
            self.drop_page(number);
        }
    }

    /// How many strings are stored.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes that the strings occupy, with all that is around them.
    #[cfg(test)]
    pub(crate) fn footprint(&self) -> usize {
        self.pages.iter().map(|page| page.data.len()).sum::<usize>() + self.pages.capacity() * size_of::<Page>()
    }

    fn take_block(&mut self, number: u8, class: Class) -> (u32, u32) {
        let first = self.roomy.get(usize::from(number)).copied().filter(|page| *page != NO_PAGE);
        let page = first.unwrap_or_else(|| {
            let page = self.add_page(class, PAGE);
            self.link(number, page);
            page
        });
        let Some(found) = self.pages.get_mut(page as usize) else { return (page, 0) };
        let unit = found.take_block();
        if !found.has_room() {
            self.unlink(number, page);
        }
        (page, unit)
    }

    fn add_page(&mut self, class: Class, size: usize) -> u32 {
        let live = u16::from(class == Class::Alone);
        let page = Page {
            data: vec![0; size].into_boxed_slice(),
            free: NO_BLOCK,
            used: 0,
            live,
            class,
            before: NO_PAGE,
            after: NO_PAGE,
        };
        match self.pages.get_mut(self.vacant as usize) {
            Some(place) => {
                let number = std::mem::replace(&mut self.vacant, place.after);
                *place = page;
                number
            }
            None => {
                // A handle has room for 32 gigabytes.
                self.pages.push(page);
                self.pages.len() as u32 - 1
            }
        }
    }

    fn drop_page(&mut self, number: u32) {
        if let Some(page) = self.pages.get_mut(number as usize) {
            page.data = Box::default();
            page.live = 0;
            page.after = std::mem::replace(&mut self.vacant, number);
        }
    }

    fn link(&mut self, class: u8, number: u32) {
        let Some(first) = self.roomy.get_mut(usize::from(class)) else { return };
        let after = std::mem::replace(first, number);
        if let Some(page) = self.pages.get_mut(after as usize) {
            page.before = number;
        }
        if let Some(page) = self.pages.get_mut(number as usize) {
            (page.before, page.after) = (NO_PAGE, after);
        }
    }

    fn unlink(&mut self, class: u8, number: u32) {
        let Some(page) = self.pages.get_mut(number as usize) else { return };
        let before = std::mem::replace(&mut page.before, NO_PAGE);
        let after = std::mem::replace(&mut page.after, NO_PAGE);
        if let Some(page) = self.pages.get_mut(after as usize) {
            page.before = before;
        }
        match self.pages.get_mut(before as usize) {
            Some(page) => page.after = after,
            None => {
                if let Some(first) = self.roomy.get_mut(usize::from(class)) {
                    *first = after;
                }
            }
        }
    }
}

impl Page {
    fn has_room(&self) -> bool {
        let Some(block) = self.class.block() else { return false };
        self.free != NO_BLOCK || (usize::from(self.used) + 1) * block <= self.data.len()
    }

    /// Returns the first unit of a block that was free.
    fn take_block(&mut self) -> u32 {
        let units = self.class.block().unwrap_or(PAGE) / UNIT;
        self.live += 1;
        if self.free == NO_BLOCK {
            self.used += 1;
            return (usize::from(self.used) - 1) as u32 * units as u32;
        }
        let unit = self.free;
        let start = usize::from(unit) * UNIT;
        let next = self.data.get(start..start + 2).and_then(|bytes| bytes.try_into().ok());
        self.free = next.map_or(NO_BLOCK, u16::from_le_bytes);
        unit.into()
    }

    fn free_block(&mut self, unit: u32) {
        // Units of a page fit into sixteen bits.
        let unit = unit as u16;
        let start = usize::from(unit) * UNIT;
        if let Some(place) = self.data.get_mut(start..start + 2) {
            place.copy_from_slice(&self.free.to_le_bytes());
            self.free = unit;
        }
    }
}

/// Returns the length as bytes of seven bits each, lowest first, and how many of them there are.
fn length_prefix(length: usize) -> ([u8; 10], usize) {
    let mut prefix = [0; 10];
    let (mut rest, mut width) = (length, 0);
    for place in &mut prefix {
        width += 1;
        *place = (rest & 0x7f) as u8;
        rest >>= 7;
        if rest == 0 {
            break;
        }
        *place |= 0x80;
    }
    (prefix, width)
}

fn read_length(block: &[u8]) -> Option<(usize, usize)> {
    // Nearly all of them.
    if let Some(byte) = block.first().filter(|byte| **byte < 0x80) {
        return Some((usize::from(*byte), 1));
    }
    let mut length = 0;
    for (width, byte) in block.iter().take(10).enumerate() {
        length |= usize::from(byte & 0x7f).checked_shl(7 * width as u32)?;
        if byte & 0x80 == 0 {
            return Some((length, width + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Lengths around every edge: of a unit, of a class, of the length prefix, of a page.
    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![0..40usize, 120..136usize, 250..300usize, 990..1100usize, 8100..8300usize, 16_380..16_390usize]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn every_string_is_what_was_stored_until_it_is_removed(
            steps in prop::collection::vec((0..30u8, length(), any::<u8>(), 0..3u8), 0..200),
        ) {
            let mut bytes = Bytes::default();
            let mut model: BTreeMap<u8, (u32, Vec<u8>)> = BTreeMap::new();
            for (key, length, fill, verb) in steps {
                let value: Vec<u8> = (0..length).map(|n| fill.wrapping_add(n as u8)).collect();
                match (model.remove(&key), verb) {
                    (None, _) => drop(model.insert(key, (bytes.insert(&value), value))),
                    (Some((handle, _)), 0) => drop(model.insert(key, (bytes.replace(handle, &value), value))),
                    (Some((handle, _)), _) => bytes.remove(handle),
                }
                prop_assert_eq!(bytes.len(), model.len());
                prop_assert_eq!(bytes.is_empty(), model.is_empty());
                for (handle, value) in model.values() {
                    prop_assert_eq!(bytes.get(*handle), &value[..]);
                }
            }
            for (handle, _) in model.into_values() {
                bytes.remove(handle);
            }
            prop_assert_eq!(bytes.footprint(), 0);
        }
    }

    #[test]
    fn short_strings_cost_little_more_than_their_bytes() {
        for length in [7, 23, 60, 200, 500] {
            let mut bytes = Bytes::default();
            let value = vec![1; length];
            for _ in 0..10_000 {
                bytes.insert(&value);
            }
            let each = bytes.footprint() / 10_000;
            assert!(each <= length + 10 + length / 8, "{each} bytes for {length}");
        }
    }

    #[test]
    fn pages_are_given_back_and_rooms_are_used_again() {
        let mut bytes = Bytes::default();
        let handles: Vec<u32> = (0..100_000u32).map(|n| bytes.insert(format!("string-{n:09}").as_bytes())).collect();
        let full = bytes.footprint();
        for (n, handle) in handles.iter().enumerate().filter(|(n, _)| n % 2 == 0) {
            assert_eq!(bytes.get(*handle), format!("string-{n:09}").as_bytes());
            bytes.remove(*handle);
        }
        for n in 0..50_000u32 {
            bytes.insert(format!("another{n:09}").as_bytes());
        }
        assert_eq!(bytes.footprint(), full);
        let mut bytes = Bytes::default();
        let handles: Vec<u32> = (0..100_000u32).map(|n| bytes.insert(format!("string-{n:09}").as_bytes())).collect();
        for handle in &handles[1_000..] {
            bytes.remove(*handle);
        }
        assert!(bytes.footprint() < full / 8, "{} of {full}", bytes.footprint());
    }
}
