//! `skimmer mount`: make an image usable at a directory.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use skimmer_client::{AttachMode, MountRequest, Record};
use skimmer_fetcher::reference::Reference;

use crate::{Global, daemon, image, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A converted image.
    image: String,
    /// An existing directory.
    target: PathBuf,
    /// How the kernel asks for data: auto, fscache, fanotify or local.
    #[arg(long, short, default_value_t)]
    mode: AttachMode,
    /// Write down what is read and fetched, for `skimmer report` (events) or `skimmer optimize` (exact: nothing is
    /// fetched but what is read).
    #[arg(long, value_name = "KIND", num_args = 0..=1, default_missing_value = "events", require_equals = true)]
    record: Option<Record>,
    #[command(flatten)]
    registry: image::Registry,
    #[command(flatten)]
    daemon: daemon::Daemon,
    #[command(flatten)]
    start: daemon::Start,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let reference = Reference::parse_source(&options.image)?;
    let target = options
        .target
        .canonicalize()
        .with_context(|| format!("cannot mount at {}", options.target.display()))?;
    if !target.is_dir() {
        bail!("cannot mount at {}: it is not a directory", target.display());
    }
    let mut request = MountRequest::new(absolute(&reference)?, target);
    request.mode = options.mode;
    request.record = options.record;
    request.credentials = options.registry.credentials()?;
    request.insecure = options.registry.insecure(&reference);
    request.ca = options.registry.ca()?;
    let bar = output::progress(global, &format!("mounting {}", options.image));
    let (client, started) = options.daemon.connect_or_start(&options.start).await?;
    let mount = client.mount(&request).await;
    bar.finish_and_clear();
    let mount = mount?;
    if global.json {
        return output::json(&mount);
    }
    if !global.quiet {
        if started {
            output::line(&format!("skimmerd was started; it answers on {}", client.socket().display()))?;
        }
        let place = mount.target.display();
        output::line(&format!("{} is mounted at {place} ({}: {})", mount.image, mount.mode, mount.reason))?;
    }
    Ok(())
}

/// The image's name as a daemon with another working directory understands it.
pub(super) fn absolute(reference: &Reference) -> Result<String> {
    let mut reference = reference.clone();
    match &mut reference {
        Reference::Registry(_) | Reference::Origin(_) => {}
        Reference::Layout { dir: path, .. } | Reference::Archive { file: path, .. } => {
            *path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
        }
        Reference::Tree(dir) => {
            let dir = dir.display();
            bail!("{dir} is a plain directory, not an image; make one with: skimmer convert {dir} ./img");
        }
    }
    let text = reference.to_string();
    if text.contains(char::REPLACEMENT_CHARACTER) {
        bail!("the image's path is not valid UTF-8: {text}");
    }
    Ok(text)
}
