//! The current time. A test can replace it.

use jiff::Timestamp;

/// The current time. With the feature `failpoints`, the time (RFC 3339) in the file that KANDLE_TEST_CLOCK names, so
/// that a test can move the clock.
pub fn now() -> Timestamp {
    #[cfg(feature = "failpoints")]
    if let Some(now) = test_time() {
        return now;
    }
    Timestamp::now()
}

#[cfg(feature = "failpoints")]
fn test_time() -> Option<Timestamp> {
    let path = std::env::var_os("KANDLE_TEST_CLOCK")?;
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
