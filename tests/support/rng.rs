//! A small seeded generator (splitmix64), so that every failing case can be repeated.

use super::Page;

#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// `numerator` times in `denominator`.
    pub fn chance(&mut self, numerator: u64, denominator: u64) -> bool {
        self.below(denominator) < numerator
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }

    /// A page that does not compress.
    pub fn noise_page(&mut self) -> Page {
        self.bytes(4096).try_into().expect("4096 bytes")
    }

    /// A page that compresses well but is unlike every other.
    pub fn text_page(&mut self) -> Page {
        let mut page: Page = Box::new([0; 4096]);
        let word = self.next().to_le_bytes();
        let every = 64 + self.below(64) as usize;
        for (i, chunk) in page.chunks_mut(every).enumerate() {
            let n = chunk.len().min(8);
            chunk[..n].copy_from_slice(&word[..n]);
            chunk[0] = i as u8;
        }
        page
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}
