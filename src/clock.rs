//! The time of day, for what depends on it.

use jiff::Timestamp;

/// Now. With the feature `failpoints`, what the file says that KANDLE_TEST_CLOCK names, in RFC 3339, so
/// that a test can move it.
pub fn now() -> Timestamp {
    #[cfg(feature = "failpoints")]
    if let Some(now) = told() {
        return now;
    }
    Timestamp::now()
}

#[cfg(feature = "failpoints")]
fn told() -> Option<Timestamp> {
    let path = std::env::var_os("KANDLE_TEST_CLOCK")?;
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
