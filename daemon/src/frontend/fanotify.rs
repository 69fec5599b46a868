//! fanotify.
