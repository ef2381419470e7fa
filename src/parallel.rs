//! The same work on many items, shared among all of the machine's processors.
//!
//! Knows nothing of the items. Batches are taken in order from one counter, so a slow one holds up no other
//! (`std::thread::scope`).

use std::sync::atomic::{AtomicUsize, Ordering};

/// `f` of each item, in order. `batch`: how many items are worth a thread; as many are taken at a time.
pub fn map<T: Sync, R: Send>(items: &[T], batch: usize, f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_with(items, batch, || (), |(), item| f(item))
}

/// The same, with something that each thread makes for itself: what it remembers from one item to the next.
pub fn map_with<T: Sync, S, R: Send>(
    items: &[T],
    batch: usize,
    state: impl Fn() -> S + Sync,
    f: impl Fn(&S, &T) -> R + Sync,
) -> Vec<R> {
    let batch = batch.max(1);
    let workers =
        std::thread::available_parallelism().map_or(1, usize::from).min(items.len().div_ceil(batch));
    if workers <= 1 {
        let state = state();
        return items.iter().map(|item| f(&state, item)).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let state = state();
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(some) = items.chunks(batch).nth(number) else { return done };
            done.push((number, some.iter().map(|item| f(&state, item)).collect::<Vec<_>>()));
        }
    };
    let mut batches: Vec<(usize, Vec<R>)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut batches = work();
        // A worker that panicked has lost its batches: there is nothing in it that can.
        batches.extend(others.into_iter().filter_map(|worker| worker.join().ok()).flatten());
        batches
    });
    batches.sort_by_key(|(number, _)| *number);
    let mut all = Vec::with_capacity(batches.iter().map(|(_, done)| done.len()).sum());
    batches.into_iter().for_each(|(_, mut done)| all.append(&mut done));
    all
}

/// Sorts by a key that no two items share, or whose order among equals does not matter. `batch`: as for [`map`].
pub fn sort_by_key<T: Send, K: Ord>(items: &mut [T], batch: usize, key: impl Fn(&T) -> K + Sync) {
    let workers =
        std::thread::available_parallelism().map_or(1, usize::from).min(items.len().div_ceil(batch.max(1)));
    if items.is_sorted_by_key(&key) {
        return;
    }
    if workers <= 1 {
        return items.sort_unstable_by_key(key);
    }
    std::thread::scope(|scope| {
        for part in items.chunks_mut(items.len().div_ceil(workers)) {
            scope.spawn(|| part.sort_unstable_by_key(&key));
        }
    });
    // The stable sort finds runs that are sorted, and only merges them.
    items.sort_by_key(key);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_in_the_order_of_the_items() {
        for len in [0, 1, 31, 32, 33, 10_007] {
            let items: Vec<usize> = (0..len).collect();
            let wanted: Vec<usize> = items.iter().map(|item| item * 3).collect();
            for batch in [0, 1, 32, 20_000] {
                assert_eq!(map(&items, batch, |item| item * 3), wanted, "{len} {batch}");
            }
        }
    }

    #[test]
    fn sorted_in_parts_is_sorted() {
        for len in [0usize, 1, 2, 31, 1000, 10_007] {
            let mut items: Vec<usize> = (0..len).map(|item| item * 7919 % 10_007).collect();
            let mut wanted = items.clone();
            wanted.sort_unstable();
            sort_by_key(&mut items, 16, |item| *item);
            assert_eq!(items, wanted);
        }
    }
}
