//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]
