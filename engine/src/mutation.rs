//! Faults that can be switched on to see that the simulator notices them (feature `mutations`).

/// One promise broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "mutations"), expect(unreachable_pub, reason = "exported with the feature only"))]
pub enum Mutation {
    /// I1: a read is answered twice.
    CompleteTwice,
    /// I1: a read is never answered.
    DropCompletion,
    /// I1: the reads of a removed object are left waiting.
    ForgetRemoved,
    /// I3: a read is answered when its write is ordered, not when it is done.
    CompleteBeforeWrite,
    /// I3: a failed write counts as done.
    TrustFailedWrite,
    /// I2: a write takes a chunk along that is not verified.
    WriteUnverified,
    /// I6: flights start whatever the budget says.
    IgnoreBudget,
    /// I7: a second flight for the same chunks.
    DoubleFlight,
    /// I7: ready chunks are fetched again.
    RefetchReady,
    /// A flight's buffer is never released.
    ForgetRelease,
    /// A flight's buffer is released while a write uses it.
    EarlyRelease,
    /// The chunks of a failed flight are forgotten though reads wait for them.
    LoseRetry,
    /// The backoff is not waited for.
    SkipBackoff,
    /// A failure is remembered, and later reads fail at once.
    StickyError,
    /// Verified chunks wait for a full run although a read waits for them.
    LazyWrite,
}

impl Mutation {
    /// Every fault.
    #[cfg(feature = "mutations")]
    pub const ALL: [Self; 15] = [
        Self::CompleteTwice,
        Self::DropCompletion,
        Self::ForgetRemoved,
        Self::CompleteBeforeWrite,
        Self::TrustFailedWrite,
        Self::WriteUnverified,
        Self::IgnoreBudget,
        Self::DoubleFlight,
        Self::RefetchReady,
        Self::ForgetRelease,
        Self::EarlyRelease,
        Self::LoseRetry,
        Self::SkipBackoff,
        Self::StickyError,
        Self::LazyWrite,
    ];
}
