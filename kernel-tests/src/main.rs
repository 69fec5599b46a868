//! skimmer-agent: the guest's first process and its agent, and what tests need on either machine.
#![forbid(unsafe_code)]

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};
use kernel_tests::cri::Cri;
use kernel_tests::torture::{Budget, Compare, Fill, Kills};
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
    /// Ask a container runtime as a kubelet would
    Cri {
        /// Its socket
        socket: PathBuf,
        #[command(subcommand)]
        ask: CriAsk,
    },
    /// Kill the daemon again and again under readers who compare every byte
    Kills(Kills),
    /// Start the daemon and read an image, all of it or for ever
    Fill(Fill),
    /// Read more images than the cache may hold, one after the other
    Budget(Budget),
    /// Compare blocks of a mounted image
    Compare(Compare),
    /// Print what an HTTP server behind a unix socket answers
    Http {
        /// The socket
        socket: PathBuf,
        /// The path of the request
        path: String,
    },
}

#[derive(Subcommand)]
enum CriAsk {
    /// Pull an image, start a pod and a container of it; prints the ids of both
    Run {
        /// The image
        image: String,
        /// What the container runs
        command: Vec<String>,
    },
    /// Run a command in a container; prints its output
    Exec {
        /// The container's id
        container: String,
        /// The command
        command: Vec<String>,
    },
    /// Remove a pod with its containers, then images
    Remove {
        /// The pod's id
        pod: String,
        /// The images
        images: Vec<String>,
    },
}

impl CriAsk {
    fn run(self, socket: &Path) -> Result<()> {
        let cri = Cri::connect(socket, socket)?;
        let mut out = std::io::stdout().lock();
        match self {
            Self::Run { image, command } => {
                cri.pull(&image, None)?;
                let pod = cri.pod("one")?;
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                let container = cri.container(&pod, "container", &image, &command)?;
                writeln!(out, "{} {container}", pod.id())?;
            }
            Self::Exec { container, command } => {
                let command: Vec<&str> = command.iter().map(String::as_str).collect();
                out.write_all(&cri.exec(&container, &command)?)?;
            }
            Self::Remove { pod, images } => {
                cri.remove_pod(&pod)?;
                images.iter().try_for_each(|image| cri.remove_image(image))?;
            }
        }
        Ok(())
    }
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
        Action::Kills(kills) => {
            serde_json::to_writer(std::io::stdout().lock(), &kills.run()?)?;
            Ok(())
        }
        Action::Fill(fill) => {
            serde_json::to_writer(std::io::stdout().lock(), &fill.run()?)?;
            Ok(())
        }
        Action::Budget(budget) => {
            serde_json::to_writer(std::io::stdout().lock(), &budget.run()?)?;
            Ok(())
        }
        Action::Compare(compare) => {
            serde_json::to_writer(std::io::stdout().lock(), &compare.run()?)?;
            Ok(())
        }
        Action::Cri { socket, ask } => ask.run(&socket),
        Action::Http { socket, path } => {
            std::io::stdout().write_all(&skimmer::http_get(&socket, &path)?)?;
            Ok(())
        }
    }
}
