//! Which records belong to a share of them all: the shadow's, and the samples. The same records each time, whoever asks.

use sha2::{Digest, Sha256};

use crate::record::Partition;

/// A share of all records. A larger share holds those of a smaller one.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Hashes below this are held; `None`: all.
    below: Option<u64>,
}

impl Share {
    /// `share`: more than 0, at most 1.
    pub fn new(share: f64) -> Self {
        let below = share * 2f64.powi(64);
        Self { below: (share < 1.0).then_some(below as u64) }
    }

    /// Whether a record is held: by its key, so that records with one key are held together; without a key, by its
    /// position. The hash is the first 8 bytes of SHA-256 as a big-endian number. The partitioner's hash would hold more
    /// records of some partitions than of others.
    pub fn holds(self, key: Option<&[u8]>, (partition, offset): (&Partition, i64)) -> bool {
        let Some(below) = self.below else { return true };
        let digest = match key {
            Some(key) => Sha256::digest(key),
            None => Sha256::digest(format!("{partition}/{offset}")),
        };
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        u64::from_be_bytes(first) < below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(share: f64, key: Option<&str>, offset: i64) -> bool {
        Share::new(share).holds(key.map(str::as_bytes), (&Partition::new("t", 0), offset))
    }

    /// SHA-256 of "abc" begins with ba7816bf (FIPS 180-4): 0.72839… of all.
    #[test]
    fn the_hash_never_changes() {
        assert!(held(0.7284, Some("abc"), 0) && !held(0.7283, Some("abc"), 0));
    }

    #[test]
    fn the_share_is_that_of_the_records_and_grows_with_it() {
        for key in [true, false] {
            let mut count = 0;
            for offset in 0..10_000 {
                let text = format!("customer-{offset}");
                let of = |share| held(share, key.then_some(text.as_str()), offset);
                count += u32::from(of(0.05));
                assert!(!of(0.05) || of(0.2), "a larger share holds more");
                assert!(of(1.0));
            }
            assert!((400..600).contains(&count), "{count} of 10000");
        }
        // One key is held or not, wherever it is.
        assert!((0..100).all(|offset| held(0.7284, Some("abc"), offset)));
    }
}
