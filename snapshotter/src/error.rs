//! What containerd is told when something cannot be done.

use tonic::{Code, Status};

/// Kinds of failure that containerd tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is no such snapshot.
    NotFound,
    /// A snapshot of that name is there.
    AlreadyExists,
    /// The snapshot is in a state, or of a kind, that does not allow it.
    FailedPrecondition,
    /// The request makes no sense.
    InvalidArgument,
    /// An image's source cannot be reached, or denies access.
    Unavailable,
    /// The host refused something.
    Internal,
}

/// A failure in words, with its kind.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure.
    pub kind: Kind,
    /// What failed and why.
    pub message: String,
}

impl Error {
    /// A failure.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Adds what was being done.
    #[must_use]
    pub fn context(self, what: impl std::fmt::Display) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    pub(crate) fn not_found(key: &str) -> Self {
        Self::new(Kind::NotFound, format!("snapshot {key} does not exist"))
    }

    pub(crate) fn io(what: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::new(Kind::Internal, format!("{what} {}: {error}", path.display()))
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NotFound,
            Kind::AlreadyExists => Code::AlreadyExists,
            Kind::FailedPrecondition => Code::FailedPrecondition,
            Kind::InvalidArgument => Code::InvalidArgument,
            Kind::Unavailable => Code::Unavailable,
            Kind::Internal => Code::Internal,
        };
        Self::new(code, error.message)
    }
}
