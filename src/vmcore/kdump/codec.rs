//! How one page is compressed.
//!
//! Source: makedumpfile `diskdump_mod.h`, `DUMP_DH_COMPRESSED_*`: the flags of a page descriptor.

use super::lzo;

/// A page codec.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub(in crate::vmcore) enum Codec {
    None,
    Zlib,
    Lzo,
    Snappy,
    Zstd,
}

/// The flag of each codec; a page has at most one.
const FLAGS: [(u32, Codec); 4] =
    [(0x1, Codec::Zlib), (0x2, Codec::Lzo), (0x4, Codec::Snappy), (0x20, Codec::Zstd)];

impl Codec {
    /// The codec that a descriptor's or the header's flags name.
    pub fn from_flags(flags: u32) -> Result<Self, String> {
        let known = FLAGS.iter().fold(0, |all, (flag, _)| all | flag);
        match (FLAGS.iter().find(|(flag, _)| *flag == flags), flags) {
            (Some((_, codec)), _) => Ok(*codec),
            (None, 0) => Ok(Self::None),
            (None, _) if flags & !known == 0 => Err(format!("flags {flags:#x} name more than one codec")),
            _ => Err(format!("flags {flags:#x} are not known")),
        }
    }

    /// The codec that the status word of the header names, if any.
    pub fn from_status(status: u32) -> Option<Self> {
        FLAGS.iter().find(|(flag, _)| status & flag != 0).map(|(_, codec)| *codec)
    }

    /// Name as makedumpfile and QEMU have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Lzo => "lzo",
            Self::Snappy => "snappy",
            Self::Zstd => "zstd",
        }
    }
}

/// The state of the decoders, kept for reuse: one per thread.
pub(super) struct Decoder {
    zlib: libdeflater::Decompressor,
    /// Made when first needed: its tables are large.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    snappy: snap::raw::Decoder,
}

impl Decoder {
    pub fn new() -> Self {
        Self { zlib: libdeflater::Decompressor::new(), zstd: None, snappy: snap::raw::Decoder::new() }
    }

    /// Decodes `data` into the whole of `page`; an error is half a sentence.
    pub fn decode(&mut self, codec: Codec, data: &[u8], page: &mut [u8]) -> Result<(), String> {
        let damaged = |why: &dyn std::fmt::Display| format!("{} says: {why}", codec.name());
        let len = match codec {
            Codec::None => {
                let n = data.len().min(page.len());
                page[..n].copy_from_slice(&data[..n]);
                data.len()
            }
            Codec::Zlib => self.zlib.zlib_decompress(data, page).map_err(|error| damaged(&error))?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(|error| damaged(&error))?),
                };
                zstd.decompress_to_buffer(data, page).map_err(|error| damaged(&error))?
            }
            Codec::Lzo => lzo::decompress(data, page).map_err(|error| damaged(&error))?,
            Codec::Snappy => self.snappy.decompress(data, page).map_err(|error| damaged(&error))?,
        };
        if len != page.len() {
            return Err(format!("{len} bytes of {} where a page has {}", codec.name(), page.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn flags_name_one_codec() {
        assert_eq!(Codec::from_flags(0), Ok(Codec::None));
        assert_eq!(Codec::from_flags(0x20), Ok(Codec::Zstd));
        assert!(Codec::from_flags(0x3).unwrap_err().contains("more than one"));
        assert!(Codec::from_flags(0x40).is_err() && Codec::from_flags(u32::MAX).is_err());
    }

    #[test]
    fn a_page_is_decoded_whole_or_not_at_all() {
        let page: Vec<u8> = (0..4096u32).map(|i| (i / 7) as u8).collect();
        let mut deflate = vec![0; 8192];
        let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
        let n = compressor.zlib_compress(&page, &mut deflate).unwrap();
        deflate.truncate(n);
        let zstd = zstd::bulk::compress(&page, 1).unwrap();
        let snappy = snap::raw::Encoder::new().compress_vec(&page).unwrap();
        // 0x00 0x..: literals of the whole page, then the end mark.
        let lzo = [&[0][..], &[0; 15], &[253], &page, &[0x11, 0, 0]].concat();
        let mut decoder = Decoder::new();
        for (codec, data) in [
            (Codec::Zlib, &deflate),
            (Codec::Zstd, &zstd),
            (Codec::Snappy, &snappy),
            (Codec::Lzo, &lzo),
            (Codec::None, &page),
        ] {
            let mut out = vec![0; 4096];
            assert_eq!(decoder.decode(codec, data, &mut out), Ok(()), "{codec:?}");
            assert_eq!(out, page);
            for wrong in [4095, 4097] {
                let mut out = vec![0; wrong];
                assert!(decoder.decode(codec, data, &mut out).is_err(), "{codec:?}");
            }
            let mut out = vec![0; 4096];
            let cut = data.get(..data.len() - 5).unwrap();
            assert!(decoder.decode(codec, cut, &mut out).is_err(), "{codec:?}");
        }
    }
}
