//! Test kernels, modules and guest roots, cached by content.
