//! fanotify pre-content events.
