//! Holds the kernel's descriptors and relays fanotify events.
