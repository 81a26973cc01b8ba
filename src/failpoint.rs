//! Places at which a test may stop the process to kill it there. Without the feature `failpoints`
//! they are nothing.

/// Passes the boundary `name`, unless the variable FAILPOINTS (the fail crate's) holds the process
/// here: `name=3*off->return`.
#[inline]
pub fn pass(name: &str) {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |_| {
        eprintln!("failpoint {name} reached");
        // Until it is killed.
        loop {
            std::thread::park();
        }
    });
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
}

/// What FAILPOINTS says for `name`: `name=return(argument)`.
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
