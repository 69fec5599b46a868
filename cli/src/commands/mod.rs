//! One file per command.

pub(crate) mod check;
pub(crate) mod config;
pub(crate) mod containerd;
pub(crate) mod convert;
pub(crate) mod copy;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod mount;
pub(crate) mod optimize;
pub(crate) mod prefetch;
pub(crate) mod prepare;
pub(crate) mod record;
pub(crate) mod scrub;
pub(crate) mod status;
pub(crate) mod top;
pub(crate) mod umount;
