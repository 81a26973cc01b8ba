//! Delays between attempts: they double up to a limit, and a pause ends early when the process is asked to stop.

use std::time::{Duration, Instant};

/// Interval between two looks at whether to go on pausing.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    delay: Duration,
}

impl Backoff {
    pub fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, delay: first }
    }

    /// The next delay.
    pub fn delay(&self) -> Duration {
        self.delay
    }

    /// Takes the delay; the one after it is twice as long, up to the limit.
    pub fn take(&mut self) -> Duration {
        let delay = self.delay;
        self.delay = (delay * 2).min(self.longest);
        delay
    }

    /// Begins with the first delay again.
    pub fn reset(&mut self) {
        self.delay = self.first;
    }
}

/// Pauses the thread. Ends early, with false, once `goes_on` returns false; it is called at least once, and then every
/// 50 ms.
pub fn pause(delay: Duration, mut goes_on: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + delay;
    while goes_on() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::park_timeout(left.min(POLL_INTERVAL));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new((ms(100), ms(300)));
        assert_eq!(
            [backoff.take(), backoff.take(), backoff.take(), backoff.take()],
            [100, 200, 300, 300].map(ms)
        );
        backoff.reset();
        assert_eq!(backoff.delay(), ms(100));
    }

    #[test]
    fn a_pause_ends_once_it_is_told_to() {
        let mut asked = 0;
        let goes_on = || {
            asked += 1;
            asked < 2
        };
        assert!(!pause(Duration::from_secs(3600), goes_on));
        assert!(pause(Duration::ZERO, || true));
    }
}
