//! A byte-bounded cache of decoded pages, shared between threads.
//!
//! Knows numbers and bytes only. No lock is held while a page is decoded: two threads that miss the same
//! page both decode it, which is cheaper than one of them waiting for the other's file.

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;

/// What one entry costs beside its bytes: key, links, the reference counts.
const OVERHEAD: u64 = 64;

#[derive(Clone)]
struct ByLength;

impl Weighter<u64, Arc<[u8]>> for ByLength {
    fn weight(&self, _: &u64, page: &Arc<[u8]>) -> u64 {
        page.len() as u64 + OVERHEAD
    }
}

/// Pages by number, the least useful dropped first once their bytes exceed the bound.
pub struct PageCache {
    pages: Cache<u64, Arc<[u8]>, ByLength>,
}

impl PageCache {
    /// A cache for at most `bytes` of pages of about `page_size` bytes each.
    pub fn new(bytes: u64, page_size: u64) -> Self {
        let expected = usize::try_from(bytes / (page_size + OVERHEAD)).unwrap_or(usize::MAX).max(1);
        Self { pages: Cache::with_weighter(expected, bytes, ByLength) }
    }

    /// The page with this number, if it is held.
    pub fn get(&self, number: u64) -> Option<Arc<[u8]>> {
        self.pages.get(&number)
    }

    /// Holds `page`, as long as there is room.
    pub fn insert(&self, number: u64, page: Arc<[u8]>) {
        self.pages.insert(number, page);
    }

    /// Bytes held, with what their keeping costs.
    pub fn bytes(&self) -> u64 {
        self.pages.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_its_bytes() {
        let cache = PageCache::new(1 << 20, 4096);
        for number in 0..10_000 {
            cache.insert(number, vec![number as u8; 4096].into());
            assert!(cache.bytes() <= 1 << 20);
        }
        assert!(cache.bytes() > 1 << 18, "it keeps something: {}", cache.bytes());
        let kept = (0..10_000).filter_map(|number| Some((number, cache.get(number)?)));
        assert!(kept.into_iter().all(|(number, page)| page.iter().all(|&b| b == number as u8)));
    }
}
