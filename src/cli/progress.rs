//! Progress on a terminal: a bar on standard error, drawn by a thread of its own.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is drawn.
pub const REDRAW: Duration = Duration::from_millis(200);

/// A bar; `None` if standard error is not a terminal.
///
/// # Panics
/// If the template is not valid.
pub fn bar(template: &str) -> Option<ProgressBar> {
    std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        ProgressBar::new(0).with_style(style)
    })
}

/// A thread that reports progress repeatedly, until it is stopped.
pub struct Reporter {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Reporter {
    /// Calls `report` after each interval, and once more at the end, with whether that is the end.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(every: Duration, mut report: impl FnMut(bool) + Send + 'static) -> std::io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let work = move || {
            let mut end = false;
            while !end {
                std::thread::park_timeout(every);
                end = ends.load(Ordering::Relaxed);
                report(end);
            }
        };
        let thread = std::thread::Builder::new().name("kandle-progress".to_owned()).spawn(work)?;
        Ok(Self { over, thread })
    }

    pub fn stop(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        // The thread ends by itself, and a panic would have ended the process.
        let _ = self.thread.join();
    }
}

/// The rate of a counter between two looks at it.
pub struct Rate {
    count: u64,
    since: Instant,
}

impl Rate {
    pub fn new(since: Instant) -> Self {
        Self { count: 0, since }
    }

    /// Per second since the last call.
    pub fn next(&mut self, count: u64) -> f64 {
        let seconds = self.since.elapsed().as_secs_f64().max(1e-3);
        let rate = count.saturating_sub(self.count) as f64 / seconds;
        *self = Self { count, since: Instant::now() };
        rate
    }
}
