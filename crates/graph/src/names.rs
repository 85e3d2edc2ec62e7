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

use crate::kit::{Column, IdMap, Recent, Shelf, Strings, words};

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
    /// Numbers of keys and labels by key and value, all of them in use.
    recent: Recent,
    /// Numbers of profiles and the lists of only them by name, all of them in use.
    recent_lists: Recent,
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
        if self.labels.uses(label) == 1 {
            let key = self.keys.take(label);
            self.recent.forget(self.names.get(key), skip_number(self.labels.get(label)));
            self.names.release(key);
        }
        if self.labels.release(label) && self.labels.is_empty() {
            self.keys = Column::default();
            self.recent = Recent::default();
        }
    }

    /// Returns the numbers of a label; one more use.
    fn acquire_pair(&mut self, name: &str, value: &str) -> Label {
        if let Some((key, label)) = self.recent.get(name.as_bytes(), value.as_bytes()) {
            self.labels.retain(label);
            return Label { key, label };
        }
        let key = self.acquire_key(name);
        let label = self.acquire_label(key, value);
        self.release(key);
        self.recent.put(name.as_bytes(), value.as_bytes(), (key, label));
        Label { key, label }
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
        // The texts lie all over memory. Reading them one right after the other, before anything is done
        // with any of them, lets the processor wait for several at once.
        let shelf_of = |(name, value): (&Name, &Name)| Shelf::of(name.as_bytes(), value.as_bytes());
        let shelves: SmallVec<[Shelf; 24]> = labels.iter().map(shelf_of).collect();
        let recent = |((name, value), shelf): ((&Name, &Name), &Shelf)| {
            self.recent.get_at(*shelf, name.as_bytes(), value.as_bytes())
        };
        let recent = labels.iter().zip(&shelves).map_while(recent);
        list.extend(recent.map(|(key, label)| Label { key, label }));
        // Most often all of them were asked for lately, and so was their set: then nothing else is used.
        let is_each_used_once_more = list.len() < labels.len();
        if is_each_used_once_more {
            list.clear();
            list.extend(labels.iter().map(|(name, value)| self.acquire_pair(name, value)));
        }
        list.sort_unstable();
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        bytes.extend(list.iter().flat_map(|label| label.label.to_le_bytes()));
        let (set, new) = self.label_sets.acquire(bytes);
        match (new, is_each_used_once_more) {
            (true, false) => list.iter().for_each(|label| self.labels.retain(label.label)),
            (false, true) => list.iter().for_each(|label| self.release_label(label.label)),
            (true, true) | (false, false) => (),
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
        if let [profile] = profiles
            && let Some((_, list)) = self.recent_lists.get(profile.as_bytes(), &[])
        {
            self.profile_lists.retain(list);
            return list;
        }
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
        if let ([profile], [name]) = (&*list, profiles) {
            self.recent_lists.put(name.as_bytes(), &[], (*profile, number));
        }
        number
    }

    pub(crate) fn release_profiles(&mut self, list: u32) {
        if self.profile_lists.uses(list) == 1 {
            let profiles: SmallVec<[u32; 8]> = self.profiles_of(list).collect();
            if let [profile] = *profiles {
                self.recent_lists.forget(self.names.get(profile), &[]);
            }
            profiles.iter().for_each(|profile| self.release(*profile));
        }
        if self.profile_lists.release(list) && self.profile_lists.is_empty() {
            self.recent_lists = Recent::default();
        }
    }

    /// The names of a profile list, in order.
    pub(crate) fn profiles_of(&self, list: u32) -> impl Iterator<Item = u32> {
        words(self.profile_lists.get(list))
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 8] {
        let uses = |strings: &Strings| (0..1_000).map(|id| strings.uses(id) as usize).sum();
        let Self { names, labels, keys: _, label_sets, profile_lists, recent: _, recent_lists: _, scratch: _ } = self;
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
        let Self { names, labels, keys: _, label_sets, profile_lists, recent: _, recent_lists: _, scratch: _ } = self;
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

        // The same for lists.
        let only = |names: &mut Names, name: &str| names.acquire_profiles(&[name.into()]);
        let gone = only(&mut names, "short-lived");
        names.release_profiles(gone);
        let others = ["other", "short-lived", "other"].map(|name| only(&mut names, name));
        let all: Vec<u32> = others.iter().flat_map(|list| names.profiles_of(*list)).collect();
        assert_eq!(all, ["other", "short-lived", "other"].map(|name| names.find(name).unwrap()));
        others.into_iter().for_each(|list| names.release_profiles(list));

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

        // Numbers of labels that have gone mean others, also for who asks for the old ones again.
        let label_of = |names: &mut Names, text: &str| names.acquire_labels(&labels(text));
        let gone = label_of(&mut names, "short=lived");
        names.release_labels(gone);
        let others = ["other=one", "short=lived", "short=other"].map(|text| label_of(&mut names, text));
        let all: Vec<String> = others.iter().flat_map(|set| values(&names, *set)).collect();
        assert_eq!(all, ["one", "lived", "other"]);
        others.into_iter().for_each(|set| names.release_labels(set));

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
