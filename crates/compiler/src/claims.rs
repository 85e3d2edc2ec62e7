//! Which endpoints claim which destinations, to tell of those that several do (users.md U17.b).
//!
//! Fed with the routes of every endpoint. Who gets a destination that several claim is decided where routes are
//! written: the newest of their interfaces that is up (host.md 9.2). Here it is said whose it is at all.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use model::Name;
use program::RouteSpec;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// Interfaces by destination.
    holders: BTreeMap<IpNet, BTreeSet<Name>>,
    /// Destinations with more than one holder.
    contested: usize,
    /// Destinations that got a holder beside another since this was last asked for.
    news: BTreeSet<IpNet>,
}

impl Claims {
    /// Takes the routes of an interface in one family, before and after.
    pub(crate) fn change(&mut self, interface: &Name, old: &[RouteSpec], new: &[RouteSpec]) {
        let destinations = |routes: &[RouteSpec]| routes.iter().map(|route| route.destination).collect::<BTreeSet<_>>();
        let (old, new) = (destinations(old), destinations(new));
        for destination in old.difference(&new) {
            if let Some(holders) = self.holders.get_mut(destination) {
                holders.remove(interface);
                match holders.len() {
                    0 => drop(self.holders.remove(destination)),
                    1 => self.contested -= 1,
                    _ => (),
                }
            }
        }
        for destination in new.difference(&old) {
            let holders = self.holders.entry(*destination).or_default();
            holders.insert(Name::clone(interface));
            if holders.len() == 2 {
                self.contested += 1;
            }
            if holders.len() > 1 {
                self.news.insert(*destination);
            }
        }
    }

    /// Destinations that have become claimed by one more interface, with all their holders, unless that has
    /// passed already.
    pub(crate) fn take_news(&mut self) -> Vec<(IpNet, Vec<Name>)> {
        let news = std::mem::take(&mut self.news).into_iter();
        let holders = news.filter_map(|destination| Some((destination, self.holders.get(&destination)?)));
        holders
            .filter(|(_, holders)| holders.len() > 1)
            .map(|(destination, holders)| (destination, holders.iter().cloned().collect()))
            .collect()
    }

    /// Number of destinations that more than one endpoint claims.
    pub(crate) const fn contested(&self) -> usize {
        self.contested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(text: &str) -> Vec<RouteSpec> {
        let destinations = text.split_whitespace().map(|text| text.parse().unwrap());
        destinations.map(|destination| RouteSpec { destination, metric: 1024, mac: None }).collect()
    }

    #[test]
    fn what_several_claim_is_news_with_each_new_claim_and_counted_while_it_lasts() {
        let mut claims = Claims::default();
        let mut held: BTreeMap<&str, Vec<RouteSpec>> = BTreeMap::new();
        // Interface, its routes from now on, how many are contested then, and the news.
        let steps = [
            ("a", "10.0.0.1/32 fd10::1/128", 0, ""),
            ("b", "10.0.0.2/32", 0, ""),
            ("b", "10.0.0.2/32 fd10::1/128", 1, "fd10::1/128 a b"),
            ("b", "10.0.0.1/32 fd10::1/128", 2, "10.0.0.1/32 a b"),
            ("c", "10.0.0.1/32", 2, "10.0.0.1/32 a b c"),
            ("a", "fd10::1/128", 2, ""),
            ("c", "", 1, ""),
            ("b", "", 0, ""),
            ("a", "", 0, ""),
        ];
        for (interface, text, contested, news) in steps {
            let new = routes(text);
            let old = held.insert(interface, new.clone()).unwrap_or_default();
            claims.change(&interface.into(), &old, &new);
            let told: Vec<String> = claims
                .take_news()
                .into_iter()
                .map(|(destination, holders)| format!("{destination} {}", holders.join(" ")))
                .collect();
            assert_eq!((claims.contested(), told.join(", ").as_str()), (contested, news), "{interface} {text}");
        }
        assert!(claims.holders.is_empty());
    }

    #[test]
    fn a_claim_that_is_taken_over_within_one_batch_is_no_news() {
        let mut claims = Claims::default();
        claims.change(&"a".into(), &[], &routes("192.0.2.1/32"));
        claims.change(&"b".into(), &[], &routes("192.0.2.1/32"));
        claims.change(&"a".into(), &routes("192.0.2.1/32"), &[]);
        assert_eq!((claims.take_news(), claims.contested()), (Vec::new(), 0));
    }
}
