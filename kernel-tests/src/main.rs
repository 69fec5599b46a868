//! skimmer-agent: the guest's first process and its agent, and what tests need on either machine.
#![forbid(unsafe_code)]

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use kernel_tests::{agent, skimmer, tree};

/// The test guest's agent.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Be the first process of a guest: set it up, start the agent, reap orphans
    Init,
    /// Serve the host's requests
    Serve,
    /// Print a canonical listing of a directory tree, one JSON object a line
    Treelist {
        /// The root of the tree
        directory: PathBuf,
    },
    /// Mount an EROFS image by mount(2)
    MountErofs {
        /// The image
        source: PathBuf,
        /// A directory
        target: PathBuf,
        /// Options of the file system, with commas between them
        options: String,
    },
    /// Print what an HTTP server behind a unix socket answers
    Http {
        /// The socket
        socket: PathBuf,
        /// The path of the request
        path: String,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().action {
        Action::Init => agent::init(),
        Action::Serve => agent::serve(),
        Action::Treelist { directory } => {
            let mut out = BufWriter::new(std::io::stdout().lock());
            tree::walk(&directory, |entry| {
                serde_json::to_writer(&mut out, &entry)?;
                out.write_all(b"\n")?;
                Ok(())
            })?;
            out.flush()?;
            Ok(())
        }
        Action::MountErofs { source, target, options } => {
            let options = std::ffi::CString::new(options.strip_prefix("ro,").unwrap_or(&options))?;
            let flags = rustix::mount::MountFlags::RDONLY;
            rustix::mount::mount(&source, &target, "erofs", flags, options.as_c_str())?;
            Ok(())
        }
        Action::Http { socket, path } => {
            std::io::stdout().write_all(&skimmer::http_get(&socket, &path)?)?;
            Ok(())
        }
    }
}
