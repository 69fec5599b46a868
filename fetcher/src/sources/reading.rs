//! One range read from several hosts: from one to the next when it fails, from two at once when it is slow.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesUnordered, StreamExt as _};
use tokio::time::Instant;

use super::{Member, Permit, Sources, failure};
use crate::source::{BlobRef, Body, ErrorClass, SourceError, Urgency};

/// A reply that is being read.
struct Open {
    member: Arc<Member>,
    body: Body,
    permit: Permit,
}

/// What a host gave: its next bytes, or word of its failure.
type Arrival = Result<(Bytes, Open), SourceError>;

/// Who gave the bytes from where on.
type Origins = Mutex<Vec<(u64, Arc<Member>)>>;

pub(super) struct Reading {
    sources: Sources,
    blob: BlobRef,
    at: u64,
    end: u64,
    urgency: Urgency,
    open: Option<Open>,
    /// Hosts not asked yet, the next one last.
    left: Vec<Arc<Member>>,
    /// Those in bad standing, asked when nothing else helped, and never raced.
    last: Vec<Arc<Member>>,
    errors: Vec<SourceError>,
    /// A host that would give the whole blob only.
    rangeless: Option<Arc<Member>>,
    /// Whether that was tried.
    whole: bool,
    origins: Arc<Origins>,
}

impl Reading {
    /// Reads up to the first byte, so that a failure so far is the failure of the read.
    pub(super) async fn open(
        sources: Sources,
        blob: BlobRef,
        range: Range<u64>,
        urgency: Urgency,
    ) -> Result<Body, SourceError> {
        let (mut left, mut last) = sources.order(&blob.digest);
        left.reverse();
        last.reverse();
        let name = Arc::clone(&sources.name);
        let origins = Arc::new(Origins::default());
        let mut reading = Self {
            sources,
            blob,
            at: range.start,
            end: range.end,
            urgency,
            open: None,
            left,
            last,
            errors: Vec::new(),
            rangeless: None,
            whole: false,
            origins: Arc::clone(&origins),
        };
        let first = reading.next().await.map_err(|error| error.reading(&blob, range.clone()))?;
        let rest = stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.next().await?.map(|piece| (piece, reading)))
        });
        let pieces = stream::iter(first.map(Ok)).chain(rest);
        let blame = move |range: Range<u64>| blame(&origins, &blob, &range);
        Ok(Body::new(&*name, &blob, range, None, pieces.boxed()).with_blame(Arc::new(blame)))
    }

    /// The next bytes, from whoever gives them first; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        if self.at == self.end {
            if let Some(Open { mut body, permit, .. }) = self.open.take() {
                // The end of the reply is read too, so that its connection can be used again.
                let _ = body.next().await;
                permit.good();
            }
            return Ok(None);
        }
        // The usual case, without a race.
        if let Some(open) = &mut self.open {
            let next = open.body.next();
            let piece = if self.left.is_empty() {
                Some(next.await)
            } else {
                tokio::time::timeout(open.member.health.patience(), next).await.ok()
            };
            if let Some(Some(Ok(piece))) = piece {
                return Ok(Some(self.took(piece)));
            }
            if let Some(failed) = piece
                && let Some(open) = self.open.take()
            {
                let error = match failed {
                    Some(Err(error)) => error,
                    _ => SourceError::new(ErrorClass::Transient, open.body.source(), "it ended early"),
                };
                self.failed(&open.member, Some(open.permit), error);
            }
        }
        let (piece, open) = self.race().await?;
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        if !origins.last().is_some_and(|(_, member)| Arc::ptr_eq(member, &open.member)) {
            origins.push((self.at, Arc::clone(&open.member)));
        }
        drop(origins);
        self.open = Some(open);
        Ok(Some(self.took(piece)))
    }

    fn took(&mut self, piece: Bytes) -> Bytes {
        self.at += u64::try_from(piece.len()).expect("usize fits in 64 bits");
        piece
    }

    fn failed(&mut self, member: &Arc<Member>, permit: Option<Permit>, error: SourceError) {
        if error.class == ErrorClass::NotFound {
            member.shun(&self.blob.digest);
        }
        if error.class == ErrorClass::NoRanges && self.rangeless.is_none() && !self.whole {
            self.rangeless = Some(Arc::clone(member));
        }
        if let Some(permit) = permit {
            permit.bad(&error);
        }
        if !self.left.is_empty() {
            tracing::debug!("{error}; the next source is asked");
        }
        self.errors.push(error);
    }

    /// Whoever gives the next bytes first. The reply that is open takes part, and is joined by the next host as soon
    /// as it has had its time. At most two take part.
    async fn race(&mut self) -> Arrival {
        let mut runners: FuturesUnordered<BoxFuture<'static, Finish>> = FuturesUnordered::new();
        // In the order in which they began.
        let mut racing: Vec<Arc<Member>> = Vec::new();
        let began = Instant::now();
        // Whether the one that runs has had its time, or another has dropped out.
        let mut join = true;
        if let Some(open) = self.open.take() {
            racing.push(Arc::clone(&open.member));
            join = open.member.health.hedge();
            runners.push(Box::pin(go_on(open)));
        }
        loop {
            let mut next = self.left.pop_if(|_| join);
            if next.is_none() && runners.is_empty() && self.rangeless.is_none() {
                next = self.last.pop();
            }
            let started = Instant::now();
            if let Some(member) = next {
                let range = self.at..self.end;
                racing.push(Arc::clone(&member));
                runners.push(Box::pin(begin(member, self.blob, range, Some(self.urgency))));
            } else if runners.is_empty()
                && let Some(member) = self.rangeless.take()
            {
                self.whole = true;
                racing.push(Arc::clone(&member));
                runners.push(Box::pin(begin(member, self.blob, self.at..self.end, None)));
            }
            let finish = match racing.as_slice() {
                [] => return Err(failure(&self.sources.name, std::mem::take(&mut self.errors))),
                [only] if join && !self.left.is_empty() => {
                    let until = started + only.health.patience();
                    tokio::time::timeout_at(until, runners.next()).await.ok()
                }
                _ => Some(runners.next().await),
            };
            match finish {
                // Its time is over.
                None => join = racing.first().is_some_and(|only| only.health.hedge()),
                Some(None) => racing.clear(),
                Some(Some(Finish { member, result, permit })) => match result {
                    Ok(arrival) => {
                        for slower in racing.iter().take_while(|racer| !Arc::ptr_eq(racer, &member)) {
                            slower.health.lost(began);
                        }
                        return Ok(arrival);
                    }
                    Err(error) => {
                        racing.retain(|racer| !Arc::ptr_eq(racer, &member));
                        self.failed(&member, permit, error);
                        join = true;
                    }
                },
            }
        }
    }
}

struct Finish {
    member: Arc<Member>,
    result: Arrival,
    permit: Option<Permit>,
}

/// Waits for the next bytes of an open reply.
async fn go_on(mut open: Open) -> Finish {
    let member = Arc::clone(&open.member);
    let result = match open.body.next().await {
        Some(Ok(piece)) => return Finish { member, result: Ok((piece, open)), permit: None },
        Some(Err(error)) => Err(error),
        None => Err(SourceError::new(ErrorClass::Transient, member.source.name(), "it ended early")),
    };
    Finish { member, result, permit: Some(open.permit) }
}

/// Asks a host and waits for its first bytes. Without an urgency they come from a copy of the whole blob.
async fn begin(member: Arc<Member>, blob: BlobRef, range: Range<u64>, urgency: Option<Urgency>) -> Finish {
    let permit = match member.health.enter(urgency.unwrap_or(Urgency::Demand), member.source.name()).await {
        Ok(permit) => permit,
        Err(error) => return Finish { member, result: Err(error), permit: None },
    };
    let asked = Instant::now();
    let body = match urgency {
        Some(urgency) => member.source.read(&blob, range, urgency).await,
        None => member.source.read_whole(&blob, range).await,
    };
    match body {
        Ok(body) => {
            let finish = go_on(Open { member, body, permit }).await;
            if finish.result.is_ok() && urgency.is_some() {
                finish.member.health.answered(asked.elapsed());
            }
            finish
        }
        Err(error) => Finish { member, result: Err(error), permit: Some(permit) },
    }
}

/// Notes whose bytes of this range were wrong; gives their names.
fn blame(origins: &Origins, blob: &BlobRef, range: &Range<u64>) -> String {
    let origins = origins.lock().unwrap_or_else(PoisonError::into_inner);
    let mut names = Vec::new();
    for (at, (start, member)) in origins.iter().enumerate() {
        let end = origins.get(at + 1).map_or(u64::MAX, |(next, _)| *next);
        if *start < range.end && range.start < end {
            member.distrust(&blob.digest);
            names.push(member.source.name());
        }
    }
    names.join(" or ")
}
