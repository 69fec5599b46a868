//! RAFS v6 (EROFS) on-disk structures and their checked navigation.
