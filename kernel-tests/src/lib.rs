//! Real kernels, on the host and in QEMU: what the tests and the demo share.
//!
//! * [`tree`] lists directory trees canonically and names every difference between two of them.
//! * [`agent`] is the guest's side of [`skimmer_vm_images::Vm`].
//! * [`skips`] records a test that cannot run here, so that it is counted and not forgotten.
//! * [`debian_image`] makes images of Debian packages.
//! * [`fixture`] and [`registry`] make a hard OCI image and serve it; [`machine`] and [`skimmer`] run our programs on it,
//!   on the host and in guests alike.
//! * [`dragonfly`] runs a cluster of it in network namespaces.
//! * [`torture`] kills the daemon under readers.
//! * [`containerd`] runs a real one on our snapshots and [`container_images`]; [`cri`] asks it what a kubelet would.
#![forbid(unsafe_code)]

pub mod agent;
pub mod container_images;
pub mod containerd;
pub mod cri;
pub mod debian_image;
pub mod dragonfly;
pub mod fixture;
pub mod machine;
pub mod registry;
pub mod scenario;
pub mod skimmer;
pub mod skips;
pub mod torture;
pub mod tree;
pub mod wait;
