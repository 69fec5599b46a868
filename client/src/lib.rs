//! Types and client of the daemon's control API.
