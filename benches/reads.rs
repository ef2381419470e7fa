//! Reads pages of a dump in a given order and prints a checksum and the time as JSON.
//!
//! `scripts/bench` runs it and its twin in C over libkdumpfile (`scripts/bench.d/kdumpfile_reads.c`) on the same
//! file and list; the two must print the same count and checksum before their times are compared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use kstub::addr::{PAGE_SIZE, PhysAddr};
use kstub::backend::Dump;
use kstub::memory::PhysicalMemory;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pages read and the wrapping sum of their little-endian words.
fn read(dump: &Dump, pages: &[u64]) -> (u64, u64) {
    let mut page = [0u8; PAGE_SIZE as usize];
    let (mut count, mut sum) = (0u64, 0u64);
    for &at in pages {
        if dump.read_phys(PhysAddr(at), &mut page).stopped.is_none() {
            count += 1;
            for word in page.chunks_exact(8) {
                sum = sum.wrapping_add(u64::from_le_bytes(word.try_into().unwrap()));
            }
        }
    }
    (count, sum)
}

/// Writes the physical address of every readable page, ascending, as little-endian words.
fn list(dump: &Dump, file: &str) {
    let mut page = [0u8; PAGE_SIZE as usize];
    let pages = dump.ranges().into_iter().flat_map(|r| (r.start.0..r.end.0).step_by(PAGE_SIZE as usize));
    let readable = pages.filter(|&at| dump.read_phys(PhysAddr(at), &mut page).stopped.is_none());
    std::fs::write(file, readable.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).expect("LIST");
}

fn main() {
    // cargo bench passes --bench.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [file, pages, threads] = &arguments[..] else {
        eprintln!("usage: reads DUMP LIST THREADS   (THREADS 0 writes the LIST of readable pages)");
        return;
    };
    let threads: usize = threads.parse().expect("THREADS");
    let opened = Instant::now();
    let dump = Dump::open(file.as_ref()).unwrap_or_else(|e| panic!("{e}"));
    let open = opened.elapsed().as_secs_f64();
    if threads == 0 {
        return list(&dump, pages);
    }
    let pages = std::fs::read(pages).expect("LIST");
    let pages: Vec<u64> = pages.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
    let started = Instant::now();
    let (count, sum) = std::thread::scope(|scope| {
        let parts = pages.chunks(pages.len().div_ceil(threads));
        let workers: Vec<_> = parts.map(|part| scope.spawn(|| read(&dump, part))).collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap())
            .fold((0, 0u64), |a, b| (a.0 + b.0, a.1.wrapping_add(b.1)))
    });
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{{\"pages\": {count}, \"sum\": \"{sum:016x}\", \"open\": {open:.6}, \"seconds\": {seconds:.6}}}"
    );
}
