//! fscache.
