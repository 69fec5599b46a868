//! `skimmer prepare` and `skimmer release`: images that other programs mount.

use anyhow::Result;
use skimmer_client::{AttachMode, PrepareRequest, Prepared};
use skimmer_fetcher::reference::Reference;

use crate::{Global, daemon, image, output};

/// Arguments of `prepare`.
#[derive(clap::Args)]
pub(crate) struct Prepare {
    /// A converted image.
    image: String,
    /// How the kernel asks for data: auto, fscache, fanotify or local.
    #[arg(long, short, default_value_t)]
    mode: AttachMode,
    #[command(flatten)]
    registry: image::Registry,
    #[command(flatten)]
    daemon: daemon::Daemon,
    #[command(flatten)]
    start: daemon::Start,
}

/// Arguments of `release`.
#[derive(clap::Args)]
pub(crate) struct Release {
    /// The image as it was named to `skimmer prepare`, or its bootstrap.
    image: String,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

pub(crate) async fn prepare(options: Prepare, global: &Global) -> Result<()> {
    let reference = Reference::parse_source(&options.image)?;
    let request = PrepareRequest {
        image: super::mount::absolute(&reference)?,
        mode: options.mode,
        credentials: options.registry.credentials()?,
        insecure: options.registry.insecure(&reference),
        ca: options.registry.ca()?,
    };
    let bar = output::progress(global, &format!("preparing {}", options.image));
    let (client, started) = options.daemon.connect_or_start(&options.start).await?;
    let prepared = client.prepare(&request).await;
    bar.finish_and_clear();
    let prepared = prepared?;
    if global.json {
        return output::json(&prepared);
    }
    if started && !global.quiet {
        output::line(&format!("skimmerd was started; it answers on {}", client.socket().display()))?;
    }
    if !global.quiet {
        output::line(&format!("{} can be mounted ({}: {})", prepared.image, prepared.mode, prepared.reason))?;
    }
    for line in how(&prepared) {
        output::line(&line)?;
    }
    Ok(())
}

/// How it is mounted, for a person.
fn how(prepared: &Prepared) -> Vec<String> {
    let options = prepared.options.join(",");
    if prepared.mode == AttachMode::Fscache {
        return vec![format!("mount -t {} -o {options} {} TARGET", prepared.fstype, prepared.source)];
    }
    vec![
        format!("type:    {}", prepared.fstype),
        format!("source:  {}", prepared.source),
        format!("options: {options}"),
        "Mount it by mount(2) or fsopen(2); mount(8) would make a loop device of the file, through which nothing is \
         fetched."
            .to_owned(),
    ]
}

pub(crate) async fn release(options: Release, global: &Global) -> Result<()> {
    // A name is taken as `prepare` took it; a bootstrap is none.
    let name = match Reference::parse_source(&options.image) {
        Ok(reference) if !is_bootstrap(&options.image) => super::mount::absolute(&reference)?,
        _ => options.image.clone(),
    };
    let released = options.daemon.connect().await?.release(&name).await?;
    if global.json {
        return output::json(&released);
    }
    if !global.quiet {
        output::line(&format!("{} is no longer prepared", released.image))?;
    }
    Ok(())
}

fn is_bootstrap(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
