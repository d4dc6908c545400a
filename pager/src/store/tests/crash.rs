//! Death at every write: whatever the last operation left undone, all that the map holds is there.

use holo_proto::{PAGE_SUBPAGES, SubpageMask};

use super::arenas::MortalArena;
use super::content::{Content, noise};
use super::model::Map;
use crate::store::api::{Location, PageStore};
use crate::store::{EmbeddedStore, HeapArena};

const CAPACITY: usize = 5 << 20;
const LIMIT: u64 = 4 << 20;

/// A history of `operations` steps on a store in `arena`, cut where the arena dies.
fn live_and_die(arena: MortalArena, seed: u64, operations: usize) -> (MortalArena, Map) {
    let mut dice = noise(seed);
    let mut roll = move |sides: usize| usize::from(dice.next().unwrap()) % sides;
    let mut map = Map::default();
    let mut store = EmbeddedStore::create(arena, LIMIT);
    store.arena.operation_ended();
    for n in 0..operations as u64 {
        match roll(8) {
            0..3 => {
                let contents: Vec<_> = (0..roll(PAGE_SUBPAGES + 1) as u64)
                    .map(|i| match roll(6) {
                        0 => Content::Zero,
                        1 | 2 => Content::Filled(n << 8 | i),
                        3 => Content::Text(n * 100 + i),
                        _ => Content::Noise(n << 8 | i),
                    })
                    .collect();
                let mut after = Map::default();
                let result = after.put(&mut store, &contents, SubpageMask::ALL);
                if !store.arena.is_dead() && result.is_ok() {
                    (0..after.len()).for_each(|i| map.insert(after.at(i)));
                }
            }
            3 if map.len() > 0 => {
                let entry = map.at(roll(map.len()));
                let enters_first = roll(2) == 0;
                if enters_first {
                    map.insert(entry.clone());
                }
                store.retain(entry.0);
                if !enters_first && !store.arena.is_dead() {
                    map.insert(entry);
                }
            }
            4 => {
                for _ in 0..map.len() / 2 {
                    let location = map.remove(roll(map.len()));
                    store.release(location);
                    if store.arena.is_dead() {
                        break;
                    }
                    store.arena.operation_ended();
                }
            }
            _ if map.len() > 0 => {
                let location = map.remove(roll(map.len()));
                store.release(location);
            }
            _ => {}
        }
        if store.arena.is_dead() {
            break;
        }
        store.arena.operation_ended();
    }
    (store.into_arena(), map)
}

/// The successor has all of it, and what it stores does not hurt what was there.
fn succeeds(found: HeapArena, map: &Map) {
    let mut store = EmbeddedStore::recover(found, LIMIT, map.locations()).unwrap();
    map.check(&mut store);
    let mut news = Map::default();
    for n in 0..200 {
        let contents = [Content::Filled(n), Content::Text(n), Content::Noise(n)];
        let some = 1 + (n % 3) as usize;
        if news
            .put(&mut store, &contents[..some], SubpageMask::ALL)
            .is_err()
        {
            break;
        }
    }
    let mut all: Vec<Location> = map.locations().chain(news.locations()).collect();
    let mut both = Map::default();
    (0..map.len()).for_each(|i| both.insert(map.at(i)));
    (0..news.len()).for_each(|i| both.insert(news.at(i)));
    both.check(&mut store);
    all.drain(..).for_each(|location| store.release(location));
    assert_eq!(store.refused(), 0);
    assert_eq!(store.held_bytes(), 0);
}

#[test]
fn a_death_at_any_write_loses_nothing_that_the_map_holds() {
    let mut deaths = 0;
    for seed in 0..6 {
        for dies_at in 1.. {
            let arena = MortalArena::new(HeapArena::new(CAPACITY), dies_at);
            let (arena, map) = live_and_die(arena, seed, 40);
            if !arena.is_dead() {
                break;
            }
            deaths += 1;
            let found = arena.corpse(seed << 32 | dies_at);
            if map.len() == 0
                && EmbeddedStore::recover(found.clone(), LIMIT, [].into_iter()).is_err()
            {
                // Killed while the arena was made: nothing had been put.
                assert!(dies_at <= 2);
                continue;
            }
            succeeds(found, &map);
        }
    }
    assert!(
        deaths > 500,
        "the histories have writes to die at: {deaths}"
    );
}

#[test]
fn a_recovery_that_dies_is_done_again() {
    let mut deaths = 0;
    for seed in 0..4 {
        let arena = MortalArena::new(HeapArena::new(CAPACITY), u64::MAX);
        let (arena, map) = live_and_die(arena, seed, 60);
        let arena = arena.corpse(0);
        for dies_at in 1.. {
            let again = MortalArena::new(arena.clone(), dies_at);
            let store = EmbeddedStore::recover(again, LIMIT, map.locations()).unwrap();
            let again = store.into_arena();
            if !again.is_dead() {
                break;
            }
            deaths += 1;
            succeeds(again.corpse(seed << 32 | dies_at), &map);
        }
    }
    assert!(deaths > 20, "recovery writes: {deaths}");
}
