//! The keeper's process.
