//! Test kernels, modules and guest roots, cached by content.
//!
//! [`prepare`] turns an entry of `kernels.toml` into a bootable kernel with its modules, [`GuestRoot`] packs an
//! initramfs around our programs, [`disk`] makes ext4 images, and [`Vm`] boots them in QEMU and runs commands in
//! the guest. Everything that is slow is done once and found again by a content key (see [`cache`]).
#![forbid(unsafe_code)]

pub mod apt;
pub mod cache;
mod channel;
pub mod debian;
pub mod disk;
mod guest;
mod kernel;
mod process;
pub mod protocol;
mod qemu;
mod recipe;
mod vm;

pub use guest::GuestRoot;
pub use kernel::{Kernel, prepare};
pub use process::run;
pub use qemu::{Accelerator, missing};
pub use recipe::{AttachMode, Rebuild, Recipe, recipe, recipes};
pub use vm::{BootConfig, Disk, Guest, Output, Pending, Vm, command};
