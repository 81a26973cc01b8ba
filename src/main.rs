//! The kandle binary: see `cli` for the commands and `pipeline` for what `run` does.

use std::ffi::c_long;
use std::process::ExitCode;

use libmimalloc_sys::{mi_option_set_default, mi_option_t};

/// mimalloc keeps and reuses large blocks: forward passes allocate and free tens of megabytes a second.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long freed memory is kept before it goes back to the system, in milliseconds. With mimalloc's default of one
/// second, memory that threads have passed on and freed exceeds `memory.limit`. MIMALLOC_PURGE_DELAY overrides this.
const PURGE_DELAY: c_long = 100;
/// `mi_option_purge_delay` of mimalloc.h, which the binding does not name.
const MI_OPTION_PURGE_DELAY: mi_option_t = 15;

fn main() -> ExitCode {
    // SAFETY: the option exists, and no other thread runs yet.
    unsafe { mi_option_set_default(MI_OPTION_PURGE_DELAY, PURGE_DELAY) };
    // Exit when any thread panics: a daemon without one of its stages looks healthy and does nothing.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if kandle::guard::is_guarded() {
            return;
        }
        report(panic);
        std::process::exit(1);
    }));
    kandle::failpoint::start();
    kandle::cli::main()
}
