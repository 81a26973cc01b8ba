//! The fuzzed readers for a few seconds: committed inputs, and random changes of them. No panic, and no allocation beyond
//! a bound. KANDLE_FUZZ_SECONDS sets the time for each reader, KANDLE_FUZZ_SEED the first random number.

#[path = "../fuzz/readers.rs"]
mod readers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// Counts what each thread holds.
struct Counting;

fn count(bytes: isize) {
    // Threads allocate while they end, too.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's layout is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `at` is from `alloc` with the same layout.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: `at` is from `alloc` with the same layout.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that reading one value of at most [`LONGEST`] may hold at once.
const BOUND: isize = 8 << 20;
const LONGEST: usize = 4096;

/// xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Changes an input in a few places, as damaged or hostile producers do.
fn change(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            // Lengths and counts are near the ends of their types.
            2 => drop(
                bytes.splice(at..at, [0xff, 0xff, 0xff, 0xff, 0x7f].into_iter().take(1 + random.below(5))),
            ),
            3 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            4 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'\\'][random.below(8)],
            5 => {
                let from = random.below(other.len() + 1);
                let to = from + random.below(other.len() - from + 1);
                drop(bytes.splice(at..at, other[from..to].iter().copied()));
            }
            _ => {
                let again = bytes[..at].to_vec();
                bytes.extend(again);
            }
        }
        bytes.truncate(LONGEST);
    }
}

/// Prints the input if the reader panics.
struct Shown<'a>(&'a str, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("the reader {} panicked on {hex}", self.0);
        }
    }
}

fn fuzz(name: &str, read: fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = number("KANDLE_FUZZ_SECONDS").unwrap_or(3);
    let mut random = Random(number("KANDLE_FUZZ_SEED").unwrap_or(1).max(1));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    // In an order that does not depend on the file system.
    seeds.sort();
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|path| std::fs::read(path).expect("a file")).collect();
    assert!(!seeds.is_empty(), "{} has no inputs", folder.display());

    let one = |bytes: &[u8]| {
        let shown = Shown(name, bytes);
        let before = HELD.get();
        MOST.set(before);
        read(bytes);
        let most = MOST.get() - before;
        assert!(most < BOUND, "{most} bytes are held to read {}", bytes.len());
        drop(shown);
        most
    };
    // The first use makes the decoder.
    read(&[]);
    let mut most = seeds.iter().map(|seed| one(seed)).max().unwrap_or(0);
    let (until, mut count) = (Instant::now() + Duration::from_secs(seconds), 0u64);
    while Instant::now() < until {
        for _ in 0..64 {
            let mut bytes = seeds[random.below(seeds.len())].clone();
            let other = random.below(seeds.len());
            change(&mut bytes, &seeds[other], &mut random);
            most = most.max(one(&bytes));
            count += 1;
        }
    }
    println!("{name}: {count} inputs, at most {most} bytes held");
    assert!(count > 100, "{count} inputs in {seconds} s");
}

#[test]
fn avro_values() {
    fuzz("avro", readers::avro);
}

#[test]
fn protobuf_messages() {
    fuzz("protobuf", readers::protobuf);
}

#[test]
fn json_documents() {
    fuzz("json", readers::json);
}

#[test]
fn documents_with_a_json_schema() {
    fuzz("json_schema", readers::json_schema);
}

#[test]
fn schema_ids_before_the_data() {
    fuzz("frame", readers::frame);
}

#[test]
fn headers() {
    fuzz("headers", readers::headers);
}
