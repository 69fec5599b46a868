//! skimmerd: the kernel's on-demand cache backend.
#![deny(unsafe_code)]

pub mod app;
pub mod arena;
pub mod blob;
pub mod containerd;
pub mod control;
pub mod driver;
pub mod exposition;
pub mod fetch;
pub mod follow;
pub mod frontend;
pub mod metrics;
pub mod mounts;
pub mod node_metrics;
pub mod pulls;
mod requests;
pub mod ring;
pub mod service;
pub mod signals;
pub mod store;
