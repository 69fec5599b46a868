//! Sources of blob bytes, and the verification of every chunk.
