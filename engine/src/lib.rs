//! The sans-io core: plans, merges, enlarges, retries, budgets.
//!
//! The engine turns reads that wait into fetches of chunks, writes of verified chunks, and one answer per read. It
//! holds no bytes, descriptors, clocks or locks: the shell (the daemon's driver, or the simulator in `tests/`)
//! feeds it [`Input`]s with the time of day, does what the [`Output`]s say, and calls again at
//! [`Engine::next_timeout`].
//!
//! ```
//! use skimmer_engine::{Chunk, Config, Engine, Input, ObjectId, Output, ReadId, ReadySet, Time};
//! let mut engine = Engine::new(Config::default());
//! let object = ObjectId(1);
//! let chunks = vec![Chunk { start: 0, len: 4096, stored_start: 0, stored_len: 900 }];
//! let ready = ReadySet::new(1);
//! engine.handle(Time(0), Input::AddObject { object, chunks, ready });
//! engine.handle(Time(0), Input::Read { read: ReadId(7), object, offset: 100, len: 10 });
//! let Some(Output::Fetch { flight, chunks, .. }) = engine.poll_output() else { panic!("a miss must be fetched") };
//! assert_eq!(chunks, 0..1);
//! engine.handle(Time(5), Input::ChunkVerified { flight, chunk: 0 });
//! let Some(Output::Write { write, .. }) = engine.poll_output() else { panic!("a reader waits: write at once") };
//! engine.handle(Time(6), Input::WriteDone { write, result: Ok(()) });
//! let rest: Vec<Output> = core::iter::from_fn(|| engine.poll_output()).collect();
//! assert!(rest.contains(&Output::Complete { read: ReadId(7), result: Ok(()) }));
//! ```
//!
//! What the shell owes the engine:
//! * exactly one [`Input::FlightEnded`] for each [`Output::Fetch`], also after [`Output::CancelFlight`], once nothing
//!   touches the flight's buffer on the fetching side any more;
//! * exactly one [`Input::WriteDone`] for each [`Output::Write`];
//! * `ChunkVerified` before the `FlightEnded` of the same flight;
//! * outputs are acted on in order.
//!
//! What the engine owes the shell: each read is completed exactly once; each `Fetch` is followed by exactly one
//! [`Output::Release`]; no input, however odd, makes it panic.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod chunk;
mod config;
mod density;
mod engine;
mod flight;
mod ids;
mod input;
mod link;
mod mutation;
mod object;
mod output;
mod plan;
mod queue;
mod ready;
mod retry;
mod stats;
mod time;
mod waiters;
mod window;

pub use chunk::{ALIGN, Chunk, MapError, check_map, span};
pub use config::Config;
pub use engine::Engine;
pub use ids::{FlightId, ObjectId, ReadId, WriteId};
pub use input::{Failure, FailureClass, Input, WriteFailure};
#[cfg(feature = "mutations")]
pub use mutation::Mutation;
pub use object::ObjectStatus;
pub use output::{Output, ReadError};
pub use ready::ReadySet;
pub use stats::Stats;
pub use time::Time;
