//! skimmer-probe: the workloads of benches; prints what it measured as one JSON object.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use skimmer_bench::probe::{self, ReadOptions, StartOptions};

/// The workloads of benches.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Read a file block by block and time each read
    Read(ReadOptions),
    /// List a directory tree with the attributes of every name
    Walk {
        /// Its root
        directory: PathBuf,
    },
    /// Read everything below a directory and digest it
    Sum {
        /// Its root
        directory: PathBuf,
        /// A name of its top to leave out (repeatable)
        #[arg(long)]
        without: Vec<String>,
    },
    /// Read everything below a directory and throw it away
    Sweep {
        /// Its root
        directory: PathBuf,
    },
    /// Fetch ranges over one connection, each followed by one direct write
    Fetch {
        /// Where they come from
        url: String,
        /// A file of lines: offset, length, bytes to write, and perhaps the SHA-256 of what is compressed in it
        ranges: PathBuf,
        /// Where the writes go
        into: PathBuf,
    },
    /// Download blobs over one connection, decompress, hash and write their chunks
    Unpack {
        /// A file of lines: URL, offset, stored length, length and SHA-256 of a chunk
        plan: PathBuf,
        /// Where the writes go
        into: PathBuf,
    },
    /// Decompress, hash and compress what an image would be built from
    Parts {
        /// An OCI layout or a tree
        source: PathBuf,
        /// zstd or none
        #[arg(long, default_value = "zstd")]
        compression: String,
    },
    /// Start a program and time its first right output
    Start(StartOptions),
    /// Tell what processes use
    Usage {
        /// Their ids
        #[arg(required = true)]
        pids: Vec<u32>,
    },
    /// Mount by the system call itself: mount(8) makes a loop device where a file would do
    Mount {
        /// The file system's type
        #[arg(long, short = 't')]
        kind: String,
        /// What to mount
        source: PathBuf,
        /// Where
        target: PathBuf,
    },
    /// Forget all that the kernel keeps in memory of files
    DropCaches,
}

fn main() -> Result<()> {
    let value = match Arguments::parse().action {
        Action::Read(options) => serde_json::to_value(probe::read(&options)?)?,
        Action::Walk { directory } => serde_json::to_value(probe::walk(&directory)?)?,
        Action::Sum { directory, without } => serde_json::to_value(probe::sum(&directory, &without)?)?,
        Action::Sweep { directory } => serde_json::to_value(probe::sweep(&directory)?)?,
        Action::Fetch { url, ranges, into } => serde_json::to_value(probe::fetch(&url, &ranges, &into)?)?,
        Action::Unpack { plan, into } => serde_json::to_value(probe::unpack(&plan, &into)?)?,
        Action::Parts { source, compression } => {
            serde_json::to_value(probe::parts(&source, compression == "zstd")?)?
        }
        Action::Start(options) => serde_json::to_value(probe::start(&options)?)?,
        Action::Usage { pids } => serde_json::to_value(probe::usage(&pids)?)?,
        Action::Mount { kind, source, target } => {
            rustix::mount::mount(&source, &target, kind, rustix::mount::MountFlags::RDONLY, None)
                .with_context(|| format!("mount of {}", source.display()))?;
            serde_json::Value::Null
        }
        Action::DropCaches => {
            rustix::fs::sync();
            std::fs::write("/proc/sys/vm/drop_caches", "3")
                .context("cannot drop the page cache (needs root)")?;
            serde_json::Value::Null
        }
    };
    println!("{value}");
    Ok(())
}
