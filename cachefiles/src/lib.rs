//! The /dev/cachefiles on-demand protocol.
