//! The unsafe parts of the data path.
