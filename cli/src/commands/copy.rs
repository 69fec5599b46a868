//! `skimmer push` and `skimmer pull`: images move between layouts, archives and registries.

use anyhow::{Result, bail};
use skimmer_fetcher::Reference;
use skimmer_fetcher::copy::{CopyReport, Images, copy};
use skimmer_fetcher::oci::{Flavour, Platform};

use crate::{Global, image, output};

/// Arguments of `push`.
#[derive(clap::Args)]
pub(crate) struct Push {
    /// An OCI layout or archive.
    source: String,
    /// Where it goes: docker://HOST/NAME:TAG.
    destination: String,
    #[command(flatten)]
    registry: image::Registry,
}

/// Arguments of `pull`.
#[derive(clap::Args)]
pub(crate) struct Pull {
    /// The image in a registry.
    source: String,
    /// Where it goes; a path is an OCI layout to make.
    destination: String,
    /// Only the image for this platform (OS/ARCHITECTURE[/VARIANT]) instead of all.
    #[arg(long, value_parser = image::platform)]
    platform: Option<Platform>,
    #[command(flatten)]
    registry: image::Registry,
}

pub(crate) async fn push(options: Push, global: &Global) -> Result<()> {
    let source = Reference::parse_source(&options.source)?;
    let destination = Reference::parse_destination(&options.destination)?;
    if !matches!(destination, Reference::Registry(_)) {
        bail!("{} is no image in a registry; write docker://HOST/NAME:TAG", options.destination);
    }
    let bar = output::progress(global, "pushing");
    let copying = options.registry.copy_options(&destination, Images::All, &bar)?;
    let report = copy(&source, &destination, &copying).await;
    bar.finish_and_clear();
    print(&report?, &destination, global)
}

pub(crate) async fn pull(options: Pull, global: &Global) -> Result<()> {
    let source = Reference::parse_source(&options.source)?;
    let destination = Reference::parse_destination(&options.destination)?;
    if source.host().is_none() {
        bail!(
            "{} is no image in a registry; write docker://HOST/NAME:TAG, https:// or s3://",
            options.source
        );
    }
    let images = match options.platform {
        Some(platform) => Images::One(platform, Flavour::PreferConverted),
        None => Images::All,
    };
    let bar = output::progress(global, "pulling");
    let copying = options.registry.copy_options(&source, images, &bar)?;
    let report = copy(&source, &destination, &copying).await;
    bar.finish_and_clear();
    print(&report?, &destination, global)
}

fn print(report: &CopyReport, destination: &Reference, global: &Global) -> Result<()> {
    if global.json {
        return output::json(&serde_json::json!({
            "image": destination.to_string(),
            "digest": report.digest.to_string(),
            "copied": report.copied,
            "copied_bytes": report.copied_bytes,
            "skipped": report.skipped,
        }));
    }
    if global.quiet {
        return Ok(());
    }
    output::line(&format!(
        "{destination} is {}; {} blobs moved ({}), {} were there",
        report.digest,
        report.copied,
        output::bytes(report.copied_bytes),
        report.skipped
    ))
}
