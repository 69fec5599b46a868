//! skimmer-instructions: fixed work for a counter of instructions, where time is too noisy to compare.
#![forbid(unsafe_code)]

use std::hint::black_box;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use erofs_format::Image;
use skimmer_bench::content;
use skimmer_cachefiles::message::{self, Body, Message};
use skimmer_engine::{Chunk, Config, Engine, Input, ObjectId, Output, ReadId, ReadySet, Time};
use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec, verify};
use skimmer_fetcher::image::{OpenOptions, open};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::{Digest, Reference};
use skimmer_mkfs::{Input as Source, Options, convert};

/// Bytes of a chunk.
const CHUNK: u32 = 1 << 20;
/// Chunks of the engine's object.
const CHUNKS: u32 = 4096;

/// What is done.
#[derive(Clone, Copy, ValueEnum)]
enum Work {
    /// A kernel message of fscache
    Decode,
    /// A read, from its arrival to its answer
    Plan,
    /// A zstd chunk of 1 MiB with SHA-256
    Verify,
    /// A walk over an image and its chunk map
    Navigate,
}

/// Does a fixed amount of work. The difference between two numbers of repetitions is the work's own.
#[derive(Parser)]
struct Arguments {
    work: Work,
    repetitions: u32,
}

fn main() -> Result<()> {
    let Arguments { work, repetitions } = Arguments::parse();
    match work {
        Work::Decode => decode(repetitions),
        Work::Plan => plan(repetitions),
        Work::Verify => check(repetitions),
        Work::Navigate => navigate(repetitions),
    }
}

fn decode(repetitions: u32) -> Result<()> {
    let message = Message { msg_id: 7, object_id: 3, body: Body::Read { offset: 1 << 30, len: 131_072 } };
    let bytes = message.encode().context("the message does not fit")?;
    for _ in 0..repetitions {
        ensure!(message::decode(black_box(&bytes)).is_ok(), "a good message is refused");
    }
    Ok(())
}

fn plan(repetitions: u32) -> Result<()> {
    let object = ObjectId(1);
    let chunk = |at: u32| Chunk {
        start: u64::from(at) * u64::from(CHUNK),
        len: CHUNK,
        stored_start: u64::from(at) * u64::from(CHUNK / 2),
        stored_len: CHUNK / 2,
    };
    let mut engine = Engine::new(Config { read_deadline: None, ..Config::default() });
    let (chunks, ready) = ((0..CHUNKS).map(chunk).collect(), ReadySet::new(CHUNKS));
    engine.handle(Time(0), Input::AddObject { object, chunks, ready });
    for number in 0..repetitions {
        let offset = u64::from(number * 7919 % CHUNKS) * u64::from(CHUNK);
        let read = ReadId(u64::from(number));
        engine.handle(Time(1), Input::Read { read, object, offset, len: 4096 });
        let mut answered = false;
        while let Some(output) = engine.poll_output() {
            match output {
                Output::Fetch { flight, chunks, .. } => {
                    for chunk in chunks {
                        engine.handle(Time(1), Input::ChunkVerified { flight, chunk });
                    }
                    engine.handle(Time(1), Input::FlightEnded { flight, result: Ok(()) });
                }
                Output::Write { write, .. } => {
                    engine.handle(Time(1), Input::WriteDone { write, result: Ok(()) });
                }
                Output::Complete { read: done, result } => answered |= done == read && result.is_ok(),
                _ => {}
            }
        }
        ensure!(answered, "read {number} has no answer");
    }
    Ok(())
}

fn check(repetitions: u32) -> Result<()> {
    let mut data = Vec::new();
    content::write(1, 256, &mut data)?;
    let stored = zstd::bulk::compress(&data, 3)?;
    let spec = ChunkSpec {
        stored_offset: 0,
        stored_len: u32::try_from(stored.len())?,
        len: CHUNK,
        codec: Codec::Zstd,
        digest: ChunkDigest::Sha256(*Digest::of(&data).as_bytes()),
    };
    let mut buffer = vec![0; data.len()];
    for _ in 0..repetitions {
        ensure!(verify(&spec, black_box(&stored), &mut buffer[..]).is_ok(), "a good chunk is refused");
    }
    Ok(())
}

fn navigate(repetitions: u32) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    for directory in 0..20 {
        std::fs::create_dir_all(tree.join(directory.to_string()))?;
        for file in 0..50 {
            std::fs::write(tree.join(format!("{directory}/{file}")), format!("{directory} {file}"))?;
        }
    }
    let out = scratch.path().join("image");
    let layout = Layout::create(&out)?;
    convert(Source::Directory(tree), &layout, &Options::default(), &())?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let reference = Reference::Layout { dir: out, tag: None };
    let bytes = runtime.block_on(open(&reference, &OpenOptions::default()))?.bootstrap;
    for _ in 0..repetitions {
        let image = Image::parse(black_box(&bytes))?;
        let names = image.walk()?.filter(Result::is_ok).count();
        ensure!(names == 1021 && image.chunk_map(0)?.len() == 1000, "the walk misses something");
    }
    Ok(())
}
