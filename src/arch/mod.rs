//! What a processor architecture defines: registers, page tables. Knows no Linux symbol and no file format.

pub mod x86_64;
