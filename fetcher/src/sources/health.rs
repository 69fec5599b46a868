//! How a host has been doing: whether it is worth asking now, how long it takes to answer, and how many requests at
//! once it stands.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::source::{ErrorClass, SourceError, Urgency};

/// Failures in a row after which a host is left alone for a while.
const FAILURES: u32 = 5;
/// The first such while; it doubles each time the next request fails too.
const SHUT: Duration = Duration::from_millis(500);
/// The longest, so that a host that is back is found soon.
const MOST_SHUT: Duration = Duration::from_secs(5);
/// Requests at once that a host is given at first. Bodies that wait for their next flight count, of which there may be
/// 32, so fewer would hold reads back.
const LIMIT: usize = 64;
const MOST_LIMIT: usize = 128;
/// Of these, how many are kept from requests that no read waits for.
const RESERVE: usize = 2;
/// Refusals closer together than this are one.
const HALVE_EVERY: Duration = Duration::from_secs(1);
/// Answers that count for the usual time to a first byte.
const SAMPLES: usize = 64;
/// Fewer say nothing.
const FEW: usize = 8;
/// Waiting for a first byte before another host is asked: at least, and when nothing is known.
const LEAST_PATIENCE: Duration = Duration::from_millis(150);
const USUAL_PATIENCE: Duration = Duration::from_millis(500);
/// Hedged requests are paid from what other requests earn: one in twenty, and never more than a few at once.
const HEDGE_PRICE: u32 = 20;
const MOST_HEDGES: u32 = 5 * HEDGE_PRICE;
/// The most that is waited for the first byte of a host that may hang: a read is to end within a second.
const SHORT_PATIENCE: Duration = Duration::from_millis(400);
/// Wrong bytes this often within this time make a host the last to be asked for as long.
const LIES: usize = 2;
const LIES_WITHIN: Duration = Duration::from_secs(600);

/// What is known of one host, shared by all who ask it.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
    /// It may hang at any time, and is not needed: others are always asked when it is slow.
    may_hang: bool,
}

#[derive(Debug)]
struct State {
    failures: u32,
    /// Not to be asked before, and why.
    shut: Option<(Instant, String)>,
    /// Times it was shut without a success between.
    closings: u32,
    /// One request finds out whether it is back.
    probing: bool,
    first_bytes: VecDeque<Duration>,
    limit: usize,
    /// Successes since the limit last changed.
    good: usize,
    halved: Option<Instant>,
    demand: usize,
    other: usize,
    waiting: [VecDeque<oneshot::Sender<Permit>>; 2],
    hedges: u32,
    /// When a lost race last counted as a failure.
    lost: Option<Instant>,
    lies: VecDeque<Instant>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            may_hang: false,
            state: Mutex::new(State {
                failures: 0,
                shut: None,
                closings: 0,
                probing: false,
                first_bytes: VecDeque::new(),
                limit: LIMIT,
                good: 0,
                halved: None,
                demand: 0,
                other: 0,
                waiting: [VecDeque::new(), VecDeque::new()],
                hedges: MOST_HEDGES / 2,
                lost: None,
                lies: VecDeque::new(),
            }),
        }
    }
}

/// The right to one request. What became of it is told with [`Permit::good`] or [`Permit::bad`]; a permit that is
/// merely dropped says nothing about the host.
#[derive(Debug)]
pub struct Permit {
    health: Arc<Health>,
    urgency: Urgency,
    probe: bool,
    /// Whether it holds one of the host's places.
    counted: bool,
}

impl State {
    fn room(&self, urgency: Urgency) -> bool {
        match urgency {
            Urgency::Demand => self.demand < self.limit,
            Urgency::Ahead => self.demand + self.other < self.limit.saturating_sub(RESERVE).max(1),
        }
    }

    /// Counts a failure; after some in a row, or when asked for, the host is left alone.
    fn fail(&mut self, wish: Duration, probe: bool, why: &str) {
        self.failures = self.failures.saturating_add(1);
        let mut shut = wish;
        if self.failures >= FAILURES || probe {
            shut = shut.max(SHUT.saturating_mul(2u32.saturating_pow(self.closings)).min(MOST_SHUT));
            self.closings = self.closings.saturating_add(1);
        }
        if !shut.is_zero() {
            self.shut = Some((Instant::now() + shut, why.to_owned()));
        }
    }

    fn count(&mut self, urgency: Urgency) -> &mut usize {
        match urgency {
            Urgency::Demand => &mut self.demand,
            Urgency::Ahead => &mut self.other,
        }
    }
}

impl Health {
    /// Of a host that depends on others who may hang, and that others can stand in for.
    pub(crate) fn of_one_that_may_hang() -> Self {
        Self { may_hang: true, ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is to be asked before those that are not in good standing.
    pub fn is_good(&self) -> bool {
        let mut state = self.lock();
        let now = Instant::now();
        while state.lies.front().is_some_and(|lie| now.duration_since(*lie) > LIES_WITHIN) {
            state.lies.pop_front();
        }
        // A host whose time is over gets one request to show that it is back; the others go on as if it were not.
        let open = state.shut.as_ref().is_none_or(|(until, _)| *until <= now && !state.probing);
        open && state.lies.len() < LIES
    }

    /// Waits for a place among the requests to this host.
    ///
    /// # Errors
    /// At once, when the host is being left alone: how long still, and why.
    pub async fn enter(self: &Arc<Self>, urgency: Urgency, name: &str) -> Result<Permit, SourceError> {
        let waits = {
            let mut state = self.lock();
            let now = Instant::now();
            let mut probe = false;
            if let Some((until, why)) = &state.shut {
                if *until > now || state.probing {
                    let left = until.saturating_duration_since(now).max(Duration::from_millis(50));
                    let detail = format!("not asked for another {} ms: {why}", left.as_millis());
                    let error = SourceError::new(ErrorClass::Transient, name, detail);
                    return Err(error.retry_after(Some(left)));
                }
                probe = true;
                state.probing = true;
            }
            if probe || state.room(urgency) {
                *state.count(urgency) += 1;
                return Ok(Permit { health: Arc::clone(self), urgency, probe, counted: true });
            }
            let (sender, waits) = oneshot::channel();
            state.waiting[usize::from(urgency == Urgency::Ahead)].push_back(sender);
            waits
        };
        waits.await.map_err(|_| SourceError::new(ErrorClass::Transient, name, "the host's queue is gone"))
    }

    /// Gives places that are free to those who wait, demand first.
    fn admit(self: &Arc<Self>) {
        let mut state = self.lock();
        for urgency in [Urgency::Demand, Urgency::Ahead] {
            while state.room(urgency)
                && let Some(sender) = state.waiting[usize::from(urgency == Urgency::Ahead)].pop_front()
            {
                *state.count(urgency) += 1;
                let permit = Permit { health: Arc::clone(self), urgency, probe: false, counted: true };
                if let Err(mut permit) = sender.send(permit) {
                    // That one waits no more.
                    *state.count(urgency) -= 1;
                    permit.counted = false;
                }
            }
        }
    }

    /// How long to wait for a byte before another host is asked for it.
    pub fn patience(&self) -> Duration {
        let state = self.lock();
        let (usual, most) = if self.may_hang {
            (SHORT_PATIENCE, SHORT_PATIENCE)
        } else {
            (USUAL_PATIENCE, Duration::from_secs(2))
        };
        if state.first_bytes.len() < FEW {
            return usual;
        }
        let mut times: Vec<_> = state.first_bytes.iter().copied().collect();
        times.sort_unstable();
        let p95 = times[(times.len() * 95 / 100).min(times.len() - 1)];
        (p95 * 2).clamp(LEAST_PATIENCE, most)
    }

    /// Whether another host may be asked for what this one is slow to give; counts it when so.
    pub fn hedge(&self) -> bool {
        if self.may_hang {
            return true;
        }
        let mut state = self.lock();
        let may = state.hedges >= HEDGE_PRICE;
        if may {
            state.hedges -= HEDGE_PRICE;
        }
        may
    }

    /// Notes the time to a first byte.
    pub fn answered(&self, after: Duration) {
        let mut state = self.lock();
        if state.first_bytes.len() == SAMPLES {
            state.first_bytes.pop_front();
        }
        state.first_bytes.push_back(after);
    }

    /// Notes that another host was faster, although this one had its time since `began`. Races that went on together
    /// are one failure: a single piece that is long in coming may be what all of them waited for.
    pub fn lost(&self, began: Instant) {
        self.answered(began.elapsed());
        let mut state = self.lock();
        if state.lost.is_none_or(|lost| lost <= began) {
            state.lost = Some(Instant::now());
            state.fail(Duration::ZERO, false, "another host was faster time and again");
        }
    }

    /// Notes that bytes from this host were not those of the image.
    pub fn lied(&self) {
        let mut state = self.lock();
        if state.lies.len() == LIES {
            state.lies.pop_front();
        }
        state.lies.push_back(Instant::now());
    }
}

impl Permit {
    /// The request gave what it was to give.
    pub fn good(self) {
        let mut state = self.health.lock();
        state.failures = 0;
        state.closings = 0;
        state.shut = None;
        state.hedges = (state.hedges + 1).min(MOST_HEDGES);
        state.good += 1;
        if state.good >= state.limit {
            state.good = 0;
            state.limit = (state.limit + 1).min(MOST_LIMIT);
        }
    }

    /// The request failed.
    pub fn bad(self, error: &SourceError) {
        if !matches!(error.class, ErrorClass::Transient | ErrorClass::Certificate) {
            // It answers, if not as we would like it to.
            return self.good();
        }
        let now = Instant::now();
        let mut state = self.health.lock();
        if state.halved.is_none_or(|halved| now.duration_since(halved) >= HALVE_EVERY) {
            state.halved = Some(now);
            state.good = 0;
            state.limit = (state.limit / 2).max(1);
        }
        state.fail(error.retry_after.unwrap_or_default(), self.probe, &error.detail);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        {
            let mut state = self.health.lock();
            *state.count(self.urgency) -= 1;
            if self.probe {
                state.probing = false;
            }
        }
        self.health.admit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(class: ErrorClass) -> SourceError {
        SourceError::new(class, "s", "because")
    }

    async fn enter(health: &Arc<Health>) -> Result<Permit, SourceError> {
        health.enter(Urgency::Demand, "s").await
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_host_is_left_alone_and_found_again() {
        let health = Arc::new(Health::default());
        for _ in 0..FAILURES {
            assert!(health.is_good());
            enter(&health).await.unwrap().bad(&error(ErrorClass::Transient));
        }
        assert!(!health.is_good());
        let shut = enter(&health).await.unwrap_err();
        assert!(shut.detail.contains("because"), "{shut}");
        assert_eq!(shut.retry_after, Some(SHUT));
        // One request finds out; it fails, and the host is shut for longer.
        tokio::time::advance(SHUT).await;
        assert!(health.is_good());
        let probe = enter(&health).await.unwrap();
        assert!(!health.is_good());
        assert!(enter(&health).await.is_err());
        probe.bad(&error(ErrorClass::Transient));
        assert_eq!(enter(&health).await.unwrap_err().retry_after, Some(2 * SHUT));
        // A probe that is given up leaves the question open.
        tokio::time::advance(2 * SHUT).await;
        drop(enter(&health).await.unwrap());
        enter(&health).await.unwrap().good();
        let (one, other) = (enter(&health).await.unwrap(), enter(&health).await.unwrap());
        one.good();
        other.bad(&error(ErrorClass::NotFound));
        assert!(health.is_good());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_asks_for_time_gets_it() {
        let health = Arc::new(Health::default());
        let wait = Duration::from_secs(30);
        enter(&health).await.unwrap().bad(&error(ErrorClass::Transient).retry_after(Some(wait)));
        assert!(!health.is_good());
        assert_eq!(enter(&health).await.unwrap_err().retry_after, Some(wait));
        tokio::time::advance(wait).await;
        assert!(enter(&health).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn demand_goes_before_the_rest_and_a_refusal_halves_the_limit() {
        let health = Arc::new(Health::default());
        let ahead = || health.enter(Urgency::Ahead, "s");
        let mut held = Vec::new();
        for _ in 0..LIMIT - RESERVE {
            held.push(ahead().await.unwrap());
        }
        let first = tokio::spawn({
            let health = Arc::clone(&health);
            async move { health.enter(Urgency::Ahead, "s").await.unwrap() }
        });
        tokio::task::yield_now().await;
        assert!(!first.is_finished());
        // Reads do not wait for what nobody waits for.
        let mut reads = Vec::new();
        for _ in 0..LIMIT {
            reads.push(enter(&health).await.unwrap());
        }
        let gone = tokio::spawn({
            let health = Arc::clone(&health);
            async move { health.enter(Urgency::Demand, "s").await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert!(!gone.is_finished());
        gone.abort();
        tokio::task::yield_now().await;
        reads.clear();
        held.clear();
        first.await.unwrap().good();
        enter(&health).await.unwrap().bad(&error(ErrorClass::Transient));
        enter(&health).await.unwrap().bad(&error(ErrorClass::Transient));
        let state = health.lock();
        assert_eq!((state.limit, state.demand, state.other), (LIMIT / 2, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn races_lost_together_are_one_failure() {
        let health = Health::default();
        let began = Instant::now();
        tokio::time::advance(SHORT_PATIENCE).await;
        (0..2 * FAILURES).for_each(|_| health.lost(began));
        for _ in 1..FAILURES {
            assert!(health.is_good());
            let began = Instant::now();
            tokio::time::advance(SHORT_PATIENCE).await;
            health.lost(began);
        }
        assert!(!health.is_good());
    }

    #[test]
    fn patience_follows_what_was_seen() {
        let health = Health::default();
        assert_eq!(health.patience(), USUAL_PATIENCE);
        for _ in 0..95 {
            health.answered(Duration::from_millis(20));
        }
        assert_eq!(health.patience(), LEAST_PATIENCE);
        for _ in 0..10 {
            health.answered(Duration::from_millis(300));
        }
        assert_eq!(health.patience(), Duration::from_millis(600));
        let hedges = std::iter::from_fn(|| health.hedge().then_some(())).count();
        assert_eq!(u32::try_from(hedges).unwrap(), MOST_HEDGES / 2 / HEDGE_PRICE);
    }
}
