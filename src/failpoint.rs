//! Points at which a test can hold the process in order to kill it there. Without the feature `failpoints` they do
//! nothing.

/// Returns at once, unless the environment variable FAILPOINTS (of the fail crate) holds the process at `name`; for
/// instance, `name=3*off->return` does so from the fourth time on.
#[inline]
pub fn pass(name: &str) {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |_| {
        eprintln!("failpoint {name} reached");
        // Hold the thread until the test kills the process.
        loop {
            std::thread::park();
        }
    });
    // Points after a model was replaced have names of their own.
    #[cfg(feature = "failpoints")]
    if SWAPPED.load(std::sync::atomic::Ordering::Relaxed) && !name.starts_with("swapped-") {
        pass(&format!("swapped-{name}"));
    }
    let _ = name;
}

#[cfg(feature = "failpoints")]
static SWAPPED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// From now on, a point is also passed under the name `swapped-…`: the model was replaced.
#[inline]
pub fn swapped() {
    #[cfg(feature = "failpoints")]
    SWAPPED.store(true, std::sync::atomic::Ordering::Relaxed);
}

/// The argument that FAILPOINTS gives for `name`, as in `name=return(argument)`.
#[inline]
pub fn argument(name: &str) -> Option<String> {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |argument| argument);
    let _ = name;
    None
}

/// Reads FAILPOINTS.
pub fn start() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}
