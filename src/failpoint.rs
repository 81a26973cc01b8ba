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
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
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
