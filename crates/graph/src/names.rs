//! Strings, labels, label sets and profile lists as numbers.
//!
//! Filled at the entrance of the graph, by the stages that keep such things; every stage that keeps a
//! number holds a use of it and gives it back, so that churn leaves nothing behind. Equal things have
//! equal numbers, so comparing numbers is enough.
//!
//! A million labels and a hundred thousand label sets are usual, so all of them lie in byte arenas: a
//! label as its key's number and its value, a label set as the numbers of its labels.

use model::{Labels, Name};
use smallvec::SmallVec;

use crate::kit::{Column, IdMap, Strings, words};

/// Longer profile lists are searched by hash.
const LONG_LIST: usize = 64;

/// All strings and labels that the graph keeps as numbers.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Label keys, profile names, the recurring parts of endpoint keys.
    names: Strings,
    /// Values, each behind the number of its key.
    labels: Strings,
    keys: Column<u32>,
    /// Numbers of labels, sorted by the numbers of their keys.
    label_sets: Strings,
    /// Numbers of profile names, in order, each once (policy.md B-5).
    profile_lists: Strings,
    scratch: Scratch,
}

#[derive(Debug, Default)]
struct Scratch {
    bytes: Vec<u8>,
    labels: Vec<Label>,
    /// Label keys that were asked for lately; there are few, and every object has the same.
    keys: [u32; 16],
}

/// A label by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Label {
    pub(crate) key: u32,
    /// Number of key and value together.
    pub(crate) label: u32,
}

impl Names {
    /// Returns the number of a name; one more use.
    pub(crate) fn acquire(&mut self, name: &str) -> u32 {
        self.names.acquire(name.as_bytes()).0
    }

    /// As [`acquire`](Self::acquire), by a short cut for what was asked for lately.
    fn acquire_key(&mut self, name: &str) -> u32 {
        let bytes = name.as_bytes();
        let mark = bytes.len() + usize::from(bytes.last().copied().unwrap_or_default());
        if let Some(id) = self.scratch.keys.get(mark % 16).copied()
            && self.names.uses(id) > 0
            && self.names.get(id) == bytes
        {
            self.names.retain(id);
            return id;
        }
        let id = self.acquire(name);
        if let Some(place) = self.scratch.keys.get_mut(mark % 16) {
            *place = id;
        }
        id
    }

    /// One more use of a name that is in use.
    pub(crate) fn acquire_again(&mut self, id: u32) {
        self.names.retain(id);
    }

    pub(crate) fn release(&mut self, id: u32) {
        self.names.release(id);
    }

    /// Returns the number of a name that is in use.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        self.names.find(name.as_bytes())
    }

    /// Returns the bytes of a name that is in use.
    pub(crate) fn get_bytes(&self, id: u32) -> &[u8] {
        self.names.get(id)
    }

    /// Returns a name that is in use.
    pub(crate) fn get(&self, id: u32) -> Option<&str> {
        let bytes = (self.names.uses(id) > 0).then(|| self.names.get(id))?;
        std::str::from_utf8(bytes).ok()
    }

    /// Returns the number of a label whose key is in use; one more use.
    pub(crate) fn acquire_label(&mut self, key: u32, value: &str) -> u32 {
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        push_number(bytes, key);
        bytes.extend_from_slice(value.as_bytes());
        let (label, new) = self.labels.acquire(bytes);
        if new {
            self.names.retain(key);
            *self.keys.slot(label) = key;
        }
        label
    }

    pub(crate) fn release_label(&mut self, label: u32) {
        if self.labels.release(label) {
            self.names.release(self.keys.take(label));
            if self.labels.is_empty() {
                self.keys = Column::default();
            }
        }
    }

    fn key_of(&self, label: u32) -> u32 {
        self.keys.get(label).copied().unwrap_or_default()
    }

    /// The value of a label.
    pub(crate) fn value_of(&self, label: u32) -> &str {
        let bytes = skip_number(self.labels.get(label));
        // They were a string when they came in.
        std::str::from_utf8(bytes).unwrap_or_default()
    }

    /// Returns the number of a label set; one more use.
    pub(crate) fn acquire_labels(&mut self, labels: &Labels) -> u32 {
        let mut list = std::mem::take(&mut self.scratch.labels);
        list.extend(labels.iter().map(|(name, value)| {
            let key = self.acquire_key(name);
            let label = self.acquire_label(key, value);
            self.release(key);
            Label { key, label }
        }));
        list.sort_unstable();
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        bytes.extend(list.iter().flat_map(|label| label.label.to_le_bytes()));
        let (set, new) = self.label_sets.acquire(bytes);
        if !new {
            list.iter().for_each(|label| self.release_label(label.label));
        }
        list.clear();
        self.scratch.labels = list;
        set
    }

    pub(crate) fn release_labels(&mut self, set: u32) {
        if self.label_sets.uses(set) == 1 {
            let mut list = std::mem::take(&mut self.scratch.labels);
            list.extend(self.labels_of(set));
            list.drain(..).for_each(|label| self.release_label(label.label));
            self.scratch.labels = list;
        }
        self.label_sets.release(set);
    }

    /// The labels of a set, sorted by key number.
    pub(crate) fn labels_of(&self, set: u32) -> impl Iterator<Item = Label> {
        words(self.label_sets.get(set)).map(|label| Label { key: self.key_of(label), label })
    }

    /// Returns the number of a profile list without its repetitions; one more use.
    pub(crate) fn acquire_profiles(&mut self, profiles: &[Name]) -> u32 {
        let mut list: SmallVec<[u32; 8]> = SmallVec::new();
        // A list is hardly ever this long, and looking through a very long one for each of its names
        // would take seconds.
        let mut seen = (profiles.len() > LONG_LIST).then(IdMap::<u32, ()>::default);
        for profile in profiles {
            let profile = self.acquire(profile);
            let is_known = match &mut seen {
                Some(seen) => seen.insert(profile, ()).is_some(),
                None => list.contains(&profile),
            };
            if is_known {
                self.release(profile);
            } else {
                list.push(profile);
            }
        }
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        bytes.extend(list.iter().flat_map(|profile| profile.to_le_bytes()));
        let (number, new) = self.profile_lists.acquire(bytes);
        if !new {
            list.iter().for_each(|profile| self.release(*profile));
        }
        number
    }

    pub(crate) fn release_profiles(&mut self, list: u32) {
        if self.profile_lists.uses(list) == 1 {
            let profiles: SmallVec<[u32; 8]> = self.profiles_of(list).collect();
            profiles.iter().for_each(|profile| self.release(*profile));
        }
        self.profile_lists.release(list);
    }

    /// The names of a profile list, in order.
    pub(crate) fn profiles_of(&self, list: u32) -> impl Iterator<Item = u32> {
        words(self.profile_lists.get(list))
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 8] {
        let uses = |strings: &Strings| (0..1_000).map(|id| strings.uses(id) as usize).sum();
        let Self { names, labels, keys: _, label_sets, profile_lists, scratch: _ } = self;
        [
            ("names", names.len()),
            ("uses of names", uses(names)),
            ("labels", labels.len()),
            ("uses of labels", uses(labels)),
            ("label sets", label_sets.len()),
            ("uses of label sets", uses(label_sets)),
            ("profile lists", profile_lists.len()),
            ("uses of profile lists", uses(profile_lists)),
        ]
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { names, labels, keys: _, label_sets, profile_lists, scratch: _ } = self;
        names.is_empty() && labels.is_empty() && label_sets.is_empty() && profile_lists.is_empty()
    }
}

/// Appends a number in bytes of seven bits, lowest first.
fn push_number(bytes: &mut Vec<u8>, mut number: u32) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn skip_number(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| byte & 0x80 == 0).map_or(bytes.len(), |at| at + 1);
    bytes.get(end..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use testkit::build::labels;

    use super::*;

    #[test]
    fn equal_things_have_equal_numbers_and_nothing_stays_behind() {
        let mut names = Names::default();
        let [a, b, c] = ["x=1,y=2", "y=2,x=1", "x=1,y="].map(|text| names.acquire_labels(&labels(text)));
        assert!(a == b && a != c);
        let values = |names: &Names, set| -> Vec<String> {
            names.labels_of(set).map(|label| names.value_of(label.label).to_owned()).collect()
        };
        assert_eq!(values(&names, a), ["1", "2"]);
        assert_eq!(values(&names, c), ["1", ""]);
        let [x, y] = ["x", "y"].map(|key| names.find(key).unwrap());
        assert_eq!(names.labels_of(a).map(|label| label.key).collect::<Vec<_>>(), [x, y]);
        // A key does not run into its value.
        let k = names.acquire("k");
        let label = names.acquire_label(k, "\u{1}v");
        assert_eq!(names.value_of(label), "\u{1}v");

        let list = names.acquire_profiles(&["p".into(), "q".into(), "p".into()]);
        assert_eq!(list, names.acquire_profiles(&["p".into(), "q".into()]));
        assert_eq!(names.profiles_of(list).count(), 2);

        let long: Vec<Name> = (0..300).map(|n| format!("long-{}", n % 100).into()).collect();
        let long_list = names.acquire_profiles(&long);
        assert_eq!(long_list, names.acquire_profiles(&long[..100]));
        let first: Vec<u32> = long[..100].iter().map(|name| names.find(name).unwrap()).collect();
        assert_eq!(names.profiles_of(long_list).collect::<Vec<_>>(), first);
        [long_list, long_list].into_iter().for_each(|list| names.release_profiles(list));
        assert!(names.find("long-0").is_none());

        names.release_label(label);
        names.release(k);
        [a, b, c].into_iter().for_each(|set| names.release_labels(set));
        assert!(names.find("x").is_none() && !names.is_empty());
        [list, list].into_iter().for_each(|list| names.release_profiles(list));
        assert!(names.is_empty());
    }

    #[test]
    fn keys_have_numbers_of_any_length() {
        for number in [0, 1, 127, 128, 300, 1 << 14, 1 << 21, 1 << 28, u32::MAX] {
            let mut bytes = Vec::new();
            push_number(&mut bytes, number);
            bytes.push(b'v');
            assert_eq!(skip_number(&bytes), b"v", "{number}");
        }
    }
}
