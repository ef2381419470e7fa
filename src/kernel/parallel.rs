//! The same work on many items, shared among all of the machine's processors.
//!
//! Knows nothing of the items. Batches are taken in order from one counter, so a slow one holds up no other
//! (`std::thread::scope`).

use std::sync::atomic::{AtomicUsize, Ordering};

/// Items that a thread takes at a time.
const BATCH: usize = 32;

/// `f` of each item, in order.
pub fn map<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    map_with(items, || (), |(), item| f(item))
}

/// The same, with something that each thread makes for itself: what it remembers from one item to the next.
pub fn map_with<T: Sync, S, R: Send>(
    items: &[T],
    state: impl Fn() -> S + Sync,
    f: impl Fn(&S, &T) -> R + Sync,
) -> Vec<R> {
    let workers =
        std::thread::available_parallelism().map_or(1, usize::from).min(items.len().div_ceil(BATCH));
    if workers <= 1 {
        let state = state();
        return items.iter().map(|item| f(&state, item)).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let state = state();
        let mut done = Vec::new();
        loop {
            let batch = next.fetch_add(1, Ordering::Relaxed);
            let Some(from) = batch.checked_mul(BATCH).filter(|&from| from < items.len()) else {
                return done;
            };
            let some = items.iter().skip(from).take(BATCH);
            done.push((batch, some.map(|item| f(&state, item)).collect::<Vec<_>>()));
        }
    };
    let mut batches: Vec<(usize, Vec<R>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        // A worker that panicked has lost its batches: there is nothing in it that can.
        workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().collect()
    });
    batches.sort_by_key(|(batch, _)| *batch);
    batches.into_iter().flat_map(|(_, done)| done).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_in_the_order_of_the_items() {
        for len in [0, 1, BATCH - 1, BATCH, BATCH + 1, 10_007] {
            let items: Vec<usize> = (0..len).collect();
            assert_eq!(map(&items, |item| item * 3), items.iter().map(|item| item * 3).collect::<Vec<_>>());
        }
    }
}
