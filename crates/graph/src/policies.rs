//! Keys of policies as dense numbers.
//!
//! Used by `active`. A key is kept as bytes: its kind, the number of its namespace (most policies of a
//! cluster share a few) and its name.
//!
//! Invariant: a key has a number exactly while it is stored, and no two have the same.

use std::hash::BuildHasher as _;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use model::{Name, PolicyKey, PolicyKind};
use smallvec::SmallVec;

use crate::kit::{Bytes, Seed};
use crate::names::Names;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct PolicyKeys {
    by_key: HashTable<u32>,
    /// By number: handle of the key, [`VACANT`] if there is none.
    handles: Vec<u32>,
    free: Vec<u32>,
    seed: Seed,
}

const VACANT: u32 = u32::MAX;
/// Bytes before the name: kind and namespace.
const HEAD: usize = 5;

type KeyBytes = SmallVec<[u8; 64]>;

impl PolicyKeys {
    /// Returns the number of a key that is stored.
    pub(crate) fn find(&self, names: &Names, bytes: &Bytes, key: &PolicyKey) -> Option<u32> {
        let wanted = pack(key, names.find(&key.namespace)?);
        let is = |id: &u32| self.packed(bytes, *id) == Some(&*wanted);
        self.by_key.find(self.seed.hash_one(&*wanted), is).copied()
    }

    /// Returns the number of a key, storing it if it is not.
    pub(crate) fn insert(&mut self, names: &mut Names, bytes: &mut Bytes, key: &PolicyKey) -> u32 {
        let namespace = names.acquire(&key.namespace);
        let wanted = pack(key, namespace);
        let Self { by_key, handles, free, seed } = self;
        let packed = |id: &u32| handles.get(*id as usize).map(|handle| bytes.get(*handle));
        let is = |id: &u32| packed(id) == Some(&*wanted);
        let rehash = |id: &u32| packed(id).map_or(0, |key| seed.hash_one(key));
        match by_key.entry(seed.hash_one(&*wanted), is, rehash) {
            Entry::Occupied(entry) => {
                names.release(namespace);
                *entry.get()
            }
            Entry::Vacant(entry) => {
                // Four thousand million policies do not fit into memory.
                let id = free.last().copied().unwrap_or(handles.len() as u32);
                entry.insert(id);
                free.pop();
                let handle = bytes.insert(&wanted);
                match handles.get_mut(id as usize) {
                    Some(place) => *place = handle,
                    None => handles.push(handle),
                }
                id
            }
        }
    }

    /// Forgets the key of a number, which may be given to another.
    pub(crate) fn remove(&mut self, names: &mut Names, bytes: &mut Bytes, id: u32) {
        let Some(packed) = self.packed(bytes, id) else {
            debug_assert!(false, "removed a policy that is not stored");
            return;
        };
        let namespace = namespace_of(packed);
        match self.by_key.find_entry(self.seed.hash_one(packed), |known| *known == id) {
            Ok(entry) => drop(entry.remove()),
            Err(_) => debug_assert!(false, "a key was not under its hash"),
        }
        namespace.into_iter().for_each(|namespace| names.release(namespace));
        if let Some(handle) = self.handles.get_mut(id as usize) {
            bytes.remove(std::mem::replace(handle, VACANT));
        }
        self.free.push(id);
        self.shrink(bytes);
    }

    /// Gives memory back after mass departures.
    fn shrink(&mut self, bytes: &Bytes) {
        let Self { by_key, handles, seed, .. } = self;
        if by_key.is_empty() {
            let seed = seed.clone();
            *self = Self { seed, ..Self::default() };
        } else if by_key.capacity() > 64 && by_key.len() < by_key.capacity() / 8 {
            let packed = |id: &u32| handles.get(*id as usize).map(|handle| bytes.get(*handle));
            by_key.shrink_to(by_key.len() * 2, |id| packed(id).map_or(0, |key| seed.hash_one(key)));
        }
    }

    /// Returns the key that has a number.
    pub(crate) fn get(&self, names: &Names, bytes: &Bytes, id: u32) -> Option<PolicyKey> {
        let packed = self.packed(bytes, id)?;
        let name = std::str::from_utf8(packed.get(HEAD..)?).ok()?;
        let namespace = names.get(namespace_of(packed)?)?;
        let kind = *PolicyKind::ALL.get(usize::from(*packed.first()?))?;
        Some(PolicyKey { kind, namespace: Name::from(namespace), name: Name::from(name) })
    }

    fn packed<'a>(&self, bytes: &'a Bytes, id: u32) -> Option<&'a [u8]> {
        let handle = self.handles.get(id as usize).filter(|handle| **handle != VACANT)?;
        Some(bytes.get(*handle))
    }

    /// How much each container holds.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [(&'static str, usize); 2] {
        let numbered = self.handles.iter().filter(|handle| **handle != VACANT).count();
        [("keys of policies", self.by_key.len()), ("numbers of policies", numbered)]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

fn pack(key: &PolicyKey, namespace: u32) -> KeyBytes {
    let mut packed = KeyBytes::new();
    packed.push(PolicyKind::ALL.iter().position(|kind| *kind == key.kind).unwrap_or_default() as u8);
    packed.extend_from_slice(&namespace.to_le_bytes());
    packed.extend_from_slice(key.name.as_bytes());
    packed
}

fn namespace_of(packed: &[u8]) -> Option<u32> {
    packed.get(1..HEAD)?.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn any_key() -> impl Strategy<Value = PolicyKey> {
        let name = || prop::sample::select(vec!["", "a", "a/b", "ns", "größer"]).prop_map(Name::from);
        (prop::sample::select(PolicyKind::ALL.to_vec()), name(), name()).prop_map(|(kind, namespace, name)| PolicyKey {
            kind,
            namespace,
            name,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_key_has_one_number_while_it_is_stored(steps in prop::collection::vec((any_key(), any::<bool>()), 0..80)) {
            let (mut names, mut bytes, mut keys) = (Names::default(), Bytes::default(), PolicyKeys::default());
            let mut model: BTreeMap<PolicyKey, u32> = BTreeMap::new();
            for (key, store) in steps {
                if store {
                    let id = keys.insert(&mut names, &mut bytes, &key);
                    let old = model.insert(key.clone(), id);
                    prop_assert!(old.is_none_or(|old| old == id));
                } else if let Some(id) = model.remove(&key) {
                    keys.remove(&mut names, &mut bytes, id);
                }
                prop_assert_eq!(keys.find(&names, &bytes, &key), model.get(&key).copied());
                for (key, id) in &model {
                    prop_assert_eq!(keys.find(&names, &bytes, key), Some(*id));
                    let known = keys.get(&names, &bytes, *id);
                    prop_assert_eq!(known.as_ref(), Some(key));
                    prop_assert!((*id as usize) < 80);
                }
                let numbers: std::collections::BTreeSet<_> = model.values().collect();
                prop_assert_eq!(numbers.len(), model.len());
                prop_assert_eq!(keys.is_empty(), model.is_empty());
            }
            for id in model.into_values() {
                keys.remove(&mut names, &mut bytes, id);
            }
            prop_assert!(names.is_empty() && bytes.is_empty());
        }
    }
}
