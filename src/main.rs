//! The kandle binary: see `cli` for the commands and `pipeline` for what `run` does.

use std::process::ExitCode;

/// Large blocks are kept and reused: a forward allocates and frees tens of megabytes a second.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // A daemon that lives on without one of its stages looks healthy and does nothing.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(1);
    }));
    kandle::failpoint::start();
    kandle::cli::main()
}
