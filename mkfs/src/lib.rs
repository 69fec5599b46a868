//! Builds RAFS v6 images from OCI images and directories.
