//! Real kernels, on the host and in QEMU.
