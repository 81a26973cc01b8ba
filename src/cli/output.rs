//! Standard output. If its reader goes away (`kandle check | head`), the command ends quietly.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Like `println!`, but a closed pipe ends the process.
macro_rules! outln {
    ($($part:tt)*) => { $crate::cli::output::line(format_args!($($part)*)) };
}
pub(super) use outln;

/// Like `print!`, but a closed pipe ends the process.
macro_rules! out {
    ($($part:tt)*) => { $crate::cli::output::text(format_args!($($part)*)) };
}
pub(super) use out;

pub(super) fn line(line: Arguments<'_>) {
    text(format_args!("{line}\n"));
}

pub(super) fn text(text: Arguments<'_>) {
    // Any other write error, such as a full disk, must show in the exit code.
    if let Err(error) = Output.write_fmt(text).and_then(|()| Output.flush()) {
        errorln(format_args!("kandle: standard output: {error}"));
        std::process::exit(1);
    }
}

/// Like `eprintln!`, but ignores write errors.
pub(super) fn errorln(line: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Standard output as a writer; a closed pipe ends the process.
pub(super) struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        end_if_closed(io::stdout().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        end_if_closed(io::stdout().lock().flush())
    }
}

fn end_if_closed<T>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        other => other,
    }
}
