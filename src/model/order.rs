//! Sorts, and collects into maps, with little code.
//!
//! Input → output is that of `sort_by` and of `collect`. The standard library brings a sort of its own for each type of
//! item, 2.7 kB each, also for each type of map that `collect` makes: 0.2 MiB of a board's binary. Here all types share
//! one sort, of numbers; maps are made by inserting.
//!
//! Invariant: the order is the standard library's (`the_order_is_that_of_the_standard_library`).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

const INSERTION_ITEMS_MAX: usize = 16;

pub trait Order<Item> {
    /// Stable, by `compare`.
    fn order_by(&mut self, compare: impl Fn(&Item, &Item) -> Ordering);

    /// Stable, from the least to the greatest.
    fn order(&mut self)
    where
        Item: Ord,
    {
        self.order_by(Item::cmp);
    }

    /// Stable, by a key, which is made anew for each comparison.
    fn order_by_key<Key: Ord>(&mut self, key: impl Fn(&Item) -> Key) {
        self.order_by(|one, other| key(one).cmp(&key(other)));
    }
}

impl<Item> Order<Item> for [Item] {
    fn order_by(&mut self, compare: impl Fn(&Item, &Item) -> Ordering) {
        if self.len() <= INSERTION_ITEMS_MAX {
            return insert_each(self, compare);
        }
        let mut places: Vec<usize> = (0..self.len()).collect();
        sort_places(&mut places, &|one, other| compare(&self[one], &self[other]));
        for place in 0..self.len() {
            // What belongs here was swapped away as often as its place was filled before.
            let mut from = places[place];
            while from < place {
                from = places[from];
            }
            self.swap(place, from);
        }
    }
}

/// Without memory of its own: most lists are this short, and some are ordered for each request.
fn insert_each<Item>(items: &mut [Item], compare: impl Fn(&Item, &Item) -> Ordering) {
    for place in 1..items.len() {
        let mut at = place;
        while at > 0 && compare(&items[at - 1], &items[at]).is_gt() {
            items.swap(at - 1, at);
            at -= 1;
        }
    }
}

#[inline(never)]
fn sort_places(places: &mut [usize], compare: &dyn Fn(usize, usize) -> Ordering) {
    places.sort_by(|one, other| compare(*one, *other));
}

/// Maps and sets.
pub trait Gathered {}
impl<Key, Value> Gathered for BTreeMap<Key, Value> {}
impl<Item> Gathered for BTreeSet<Item> {}

pub trait Gather: Iterator + Sized {
    /// `collect` into a map or a set; of equal keys the last one stays.
    fn gather<All: Gathered + Default + Extend<Self::Item>>(self) -> All {
        let mut all = All::default();
        all.extend(self);
        all
    }
}

impl<Items: Iterator> Gather for Items {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_standard_library() {
        let mut seed = 7u64;
        for length in 0..200usize {
            let mut items: Vec<(u64, usize)> = Vec::new();
            for index in 0..length {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                items.push(((seed >> 33) % 20, index));
            }
            let (mut by_key, mut all) = (items.clone(), items.clone());
            by_key.order_by_key(|(key, _)| *key);
            all.order_by(|one, other| other.cmp(one));
            let mut expected = items.clone();
            expected.sort_by_key(|(key, _)| *key);
            assert_eq!(by_key, expected, "{length}");
            expected.sort_by(|one, other| other.cmp(one));
            assert_eq!(all, expected, "{length}");
            let gathered: BTreeMap<u64, usize> = items.iter().copied().gather();
            assert_eq!(gathered, items.into_iter().collect::<BTreeMap<_, _>>());
        }
    }
}
