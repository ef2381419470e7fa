//! Decoding LZO1X, the codec of `makedumpfile -l` and QEMU's `dump-guest-memory -l`.
//!
//! Not a crate: liblzo2 and its ports are GPL, and the others copy byte by byte, at half of liblzo2's speed. Source:
//! Linux `Documentation/staging/lzo.rst`, "Byte sequences"; no stream of the kernel's version 1 (zram only).

/// Most copies are shorter, and one move of so many bytes costs less than a loop.
const MOVE: usize = 16;

/// Decodes `data` into the start of `page`; how many bytes. An error is half a sentence.
pub(super) fn decompress(data: &[u8], page: &mut [u8]) -> Result<usize, &'static str> {
    let mut decoder = Decoder { data, at: 0, page, filled: 0 };
    // How many literals came last: 4 stands for more than 3.
    let mut state = 0;
    if let Some(&first) = data.first()
        && first > 17
    {
        decoder.at = 1;
        let literals = usize::from(first) - 17;
        decoder.literals(literals)?;
        state = literals.min(4);
    }
    loop {
        let code = decoder.byte()?;
        let low = usize::from(code);
        let (distance, len, literals) = match code {
            0..16 if state == 0 => {
                let len = if low == 0 { decoder.length(15)? } else { low };
                decoder.literals(len.saturating_add(3))?;
                state = 4;
                continue;
            }
            0..16 => {
                let high = usize::from(decoder.byte()?) << 2;
                let (base, len) = if state == 4 { (2049, 3) } else { (1, 2) };
                (high + (low >> 2) + base, len, low & 3)
            }
            16..32 => {
                let len = if low & 7 == 0 { decoder.length(7)? } else { low & 7 };
                let word = decoder.word()?;
                let distance = ((low & 8) << 11) + (word >> 2);
                if distance == 0 {
                    let whole = decoder.at == data.len() && len == 1;
                    return if whole { Ok(decoder.filled) } else { Err("bytes after its end mark") };
                }
                (distance + 16384, len.saturating_add(2), word & 3)
            }
            32..64 => {
                let len = if low & 31 == 0 { decoder.length(31)? } else { low & 31 };
                let word = decoder.word()?;
                ((word >> 2) + 1, len.saturating_add(2), word & 3)
            }
            64.. => {
                let high = usize::from(decoder.byte()?) << 3;
                (high + (low >> 2 & 7) + 1, (low >> 5) + 1, low & 3)
            }
        };
        decoder.repeat(distance, len)?;
        decoder.literals(literals)?;
        state = literals;
    }
}

const INPUT_ENDS: &str = "the data ends too early";
const PAGE_ENDS: &str = "more data than a page";

struct Decoder<'a> {
    data: &'a [u8],
    at: usize,
    page: &'a mut [u8],
    filled: usize,
}

impl Decoder<'_> {
    #[inline(always)]
    fn byte(&mut self) -> Result<u8, &'static str> {
        let byte = self.data.get(self.at).copied().ok_or(INPUT_ENDS)?;
        self.at += 1;
        Ok(byte)
    }

    #[inline(always)]
    fn word(&mut self) -> Result<usize, &'static str> {
        Ok(usize::from(self.byte()?) | usize::from(self.byte()?) << 8)
    }

    /// A length that its code has no room for: `base`, 255 for each zero, and a byte that is none.
    fn length(&mut self, base: usize) -> Result<usize, &'static str> {
        let mut len = base;
        loop {
            match self.byte()? {
                0 => len = len.saturating_add(255),
                last => return Ok(len.saturating_add(last.into())),
            }
        }
    }

    #[inline(always)]
    fn literals(&mut self, len: usize) -> Result<(), &'static str> {
        if len <= MOVE
            && let Some(from) = self.data.get(self.at..).and_then(|rest| rest.first_chunk::<MOVE>())
            && let Some(to) = self.page.get_mut(self.filled..).and_then(|rest| rest.first_chunk_mut::<MOVE>())
        {
            // What is too much is overwritten by what comes next.
            *to = *from;
        } else {
            let from = self.data.get(self.at..).and_then(|rest| rest.get(..len)).ok_or(INPUT_ENDS)?;
            let to =
                self.page.get_mut(self.filled..).and_then(|rest| rest.get_mut(..len)).ok_or(PAGE_ENDS)?;
            to.copy_from_slice(from);
        }
        self.at += len;
        self.filled += len;
        Ok(())
    }

    /// Copies `len` bytes from `distance` back; where they reach into themselves, they repeat.
    #[inline(always)]
    fn repeat(&mut self, distance: usize, len: usize) -> Result<(), &'static str> {
        let from = self.filled.checked_sub(distance).ok_or("a repetition of what lies before the page")?;
        let end = self.filled.checked_add(len).filter(|&end| end <= self.page.len()).ok_or(PAGE_ENDS)?;
        let done = match distance {
            16.. => self.moves::<16>(from, len),
            1 if len > 8 => {
                let byte = self.page.get(from).copied().unwrap_or(0);
                self.page.get_mut(self.filled..end).unwrap_or_default().fill(byte);
                len
            }
            _ if len > 2 * MOVE => self.double(from, distance, len),
            8.. => self.moves::<8>(from, len),
            4.. => self.moves::<4>(from, len),
            _ => 0,
        };
        for i in done..len {
            let byte = self.page.get(from + i).copied().unwrap_or(0);
            if let Some(to) = self.page.get_mut(self.filled + i) {
                *to = byte;
            }
        }
        self.filled = end;
        Ok(())
    }

    /// Copies a short pattern by doubling what there is of it: a processor waits for short moves out of what was moved
    /// just before. How many of `len`, which reach no further than the page.
    fn double(&mut self, from: usize, distance: usize, len: usize) -> usize {
        let Some(pattern) = self.page.get_mut(from..self.filled + len) else { return 0 };
        let mut have = distance;
        while have < pattern.len() {
            let n = have.min(pattern.len() - have);
            pattern.copy_within(..n, have);
            have += n;
        }
        len
    }

    /// Copies by `N` bytes, at most as many as lie between source and target: how many of `len`, or a few more.
    #[inline(always)]
    fn moves<const N: usize>(&mut self, from: usize, len: usize) -> usize {
        let mut done = 0;
        while done < len {
            let Some(bytes) = self.page.get(from + done..).and_then(|rest| rest.first_chunk::<N>()) else {
                break;
            };
            let bytes = *bytes;
            let to = self.page.get_mut(self.filled + done..).and_then(|rest| rest.first_chunk_mut::<N>());
            let Some(to) = to else { break };
            // What is too much is overwritten by what comes next.
            *to = bytes;
            done += N;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Literals, runs, repeats near and far, and noise.
    fn pages() -> Vec<Vec<u8>> {
        let mut seed = 5u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        let mut pages = vec![vec![0; 4096], vec![0x5a; 4096]];
        for kinds in 1..40 {
            let mut page = Vec::new();
            while page.len() < 4096 {
                let len = 1 + random(if kinds % 3 == 0 { 400 } else { 20 }) as usize;
                match random(3) {
                    0 => page.extend((0..len).map(|_| random(256) as u8)),
                    1 => page.extend(std::iter::repeat_n(random(256) as u8, len)),
                    _ if page.is_empty() => {}
                    _ => {
                        let from = random(page.len() as u32) as usize;
                        (0..len).for_each(|i| page.push(page[from + i]));
                    }
                }
            }
            page.truncate(4096);
            pages.push(page);
        }
        pages
    }

    #[test]
    fn what_another_encoder_wrote_is_read_back() {
        for page in pages() {
            let data = lzokay::compress::compress(&page).unwrap();
            let mut out = vec![0xee; 4096];
            assert_eq!(decompress(&data, &mut out), Ok(4096));
            assert_eq!(out, page);
            // A page that is too long or cut is refused.
            assert!(decompress(&data, &mut out[..4095]).is_err());
            for cut in 0..data.len() {
                assert!(decompress(&data[..cut], &mut out).is_err(), "{cut}");
            }
            assert!(decompress(&[&data[..], &[0]].concat(), &mut out).is_err());
        }
    }

    #[test]
    fn damage_is_an_error_or_what_another_decoder_reads() {
        let mut seed = 9u32;
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as usize % n
        };
        let mut agreed = 0;
        for page in pages() {
            let sound = lzokay::compress::compress(&page).unwrap();
            for _ in 0..300 {
                let mut data = sound.clone();
                for _ in 0..=random(3) {
                    let at = random(data.len());
                    data[at] ^= 1 << random(8);
                }
                let (mut mine, mut other) = (vec![0; 4096], vec![0; 4096]);
                let len = decompress(&data, &mut mine);
                if let Ok(want) = lzokay::decompress::decompress(&data, &mut other) {
                    assert_eq!(len, Ok(want));
                    assert_eq!(mine[..want], other[..want]);
                    agreed += 1;
                } else {
                    assert!(len.is_err(), "{len:?}");
                }
            }
        }
        assert!(agreed > 100, "{agreed}");
    }
}
