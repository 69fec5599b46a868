//! Decoding and hashing, on as many threads as the machine has processors, however many requests bring work.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::LazyLock;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

/// The threads; `None` where none can be started.
static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let named = ThreadPoolBuilder::new().thread_name(|number| format!("skimmer-cpu-{number}"));
    named.build().inspect_err(|error| tracing::warn!("no threads for decoding: {error}")).ok()
});

/// Gives a piece of work to them at once; the result can be waited for. Work whose result nobody waits for any more is
/// dropped, unless it has begun.
pub(crate) fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> + Send + 'static {
    let (reply, done) = oneshot::channel();
    let job = move || {
        if !reply.is_closed() {
            // Whoever waited may have gone meanwhile.
            let _ = reply.send(catch_unwind(AssertUnwindSafe(work)));
        }
    };
    match &*POOL {
        Some(pool) => pool.spawn(job),
        None => job(),
    }
    async move {
        match done.await {
            Ok(Ok(result)) => result,
            // A panic in a decoder is a bug: let it surface on the caller's task.
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => unreachable!("work that is waited for is done"),
        }
    }
}
