//! One task at a time per name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A lock per name, for as long as somebody holds or awaits it.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// Runs `work` when nobody else does under this name.
    pub(crate) async fn take<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(name.to_owned()).or_default())
        };
        let _turn = turn.lock().await;
        work.await
    }
}
