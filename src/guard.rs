//! Panics of a library over a record: an operator of tract that a record's shapes do not fit, a decoder of damaged images.
//! They are errors of the record, and not of the process, which ends on any other panic.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread is caught: the panic hook has nothing to report then.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Runs something that changes nothing but its result. `what` it is, for the message.
///
/// # Errors
/// It panicked: the panic's message.
pub(crate) fn guarded<R>(what: &str, run: impl FnOnce() -> R) -> Result<R, String> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    GUARDED.set(before);
    result.map_err(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        format!("{what} panicked: {}", message.lines().next().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        assert_eq!(guarded("the model", is_guarded), Ok(true));
        let panics = || -> u32 { [1, 2][std::hint::black_box(2)] };
        assert!(
            guarded("the model", panics).unwrap_err().starts_with("the model panicked: index out of bounds")
        );
        assert!(!is_guarded());
    }
}
