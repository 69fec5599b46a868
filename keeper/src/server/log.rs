//! One line per thing worth knowing, on standard error.

use std::fmt;
use std::io::Write;

/// Writes a line, in one piece. That nobody listens (any more) is no reason to fail.
pub(crate) fn line(args: fmt::Arguments<'_>) {
    let _ = std::io::stderr().write_all(format!("skimmer-keeper: {args}\n").as_bytes());
}

macro_rules! log {
    ($($arg:tt)*) => { $crate::server::log::line(format_args!($($arg)*)) };
}
pub(crate) use log;

/// Lets the first few lines of a kind through and then every thousandth, so that a fault that repeats with every
/// event does not fill a disk.
#[derive(Debug, Default)]
pub(crate) struct Limit(u64);

impl Limit {
    /// Counts one; true when it should be written.
    pub(crate) fn pass(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0 <= 10 || self.0.is_multiple_of(1000)
    }
}
