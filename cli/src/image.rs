//! How registries are reached: options that several commands share.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use skimmer_client as client;
use skimmer_fetcher::Reference;
use skimmer_fetcher::copy::{CopyOptions, Images, Progress, ProgressFn};
use skimmer_fetcher::credentials::{Credentials, Secret};
use skimmer_fetcher::http::HttpOptions;
use skimmer_fetcher::image::OpenOptions;
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::Platform;
use skimmer_fetcher::registry::RegistryOptions;
use tempfile::TempDir;

/// Options about the registry of an image.
#[derive(clap::Args)]
pub(crate) struct Registry {
    /// Login for the image's registry; without it docker's and podman's credential files are asked.
    #[arg(long, value_name = "USER:PASSWORD", env = "SKIMMER_CREDS", hide_env_values = true)]
    creds: Option<String>,
    /// Reach the image's registry over plain HTTP (loopback needs no permission).
    #[arg(long)]
    plain_http: bool,
    /// PEM file with certificate authorities to trust besides the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl Registry {
    fn login(&self) -> Result<Option<(&str, &str)>> {
        let Some(creds) = &self.creds else { return Ok(None) };
        Ok(Some(creds.split_once(':').context("--creds wants USER:PASSWORD")?))
    }

    /// The login as the daemon wants it.
    pub(crate) fn credentials(&self) -> Result<Option<client::Credentials>> {
        Ok(self.login()?.map(|(username, password)| client::Credentials {
            username: username.to_owned(),
            password: password.to_owned(),
        }))
    }

    /// The hosts that may be reached without TLS.
    pub(crate) fn insecure(&self, reference: &Reference) -> Vec<String> {
        reference.host().filter(|_| self.plain_http).into_iter().collect()
    }

    pub(crate) fn ca(&self) -> Result<Option<PathBuf>> {
        let Some(file) = &self.ca else { return Ok(None) };
        let file = file.canonicalize().with_context(|| format!("cannot open {}", file.display()))?;
        Ok(Some(file))
    }

    /// How to reach the registry that `reference` names.
    pub(crate) fn options(&self, reference: &Reference) -> Result<RegistryOptions> {
        let mut credentials = Credentials::lookup();
        if let (Some((user, password)), Some(host)) = (self.login()?, reference.host()) {
            credentials = credentials.with_password(&host, user, Secret::new(password));
        }
        let http = HttpOptions {
            insecure: self.insecure(reference),
            extra_ca: self.ca()?.into_iter().collect(),
            ..HttpOptions::default()
        };
        Ok(RegistryOptions { credentials, http, ..RegistryOptions::default() })
    }

    /// How to open the image that `reference` names.
    pub(crate) fn open_options(&self, reference: &Reference) -> Result<OpenOptions> {
        Ok(OpenOptions { registry: self.options(reference)?, ..OpenOptions::default() })
    }

    /// How to copy images to or from the registry that `reference` names, shown on `bar`.
    pub(crate) fn copy_options(
        &self,
        reference: &Reference,
        images: Images,
        bar: &ProgressBar,
    ) -> Result<CopyOptions> {
        Ok(CopyOptions {
            registry: self.options(reference)?,
            images,
            progress: Some(show(bar)),
            ..CopyOptions::default()
        })
    }
}

/// A folder for work files: beside a destination on disk, so that finished ones are renamed, not copied.
pub(crate) fn scratch(destination: &Reference) -> Result<TempDir> {
    let made = match destination {
        Reference::Registry(_) | Reference::Origin(_) => tempfile::tempdir(),
        Reference::Layout { dir: path, .. }
        | Reference::Archive { file: path, .. }
        | Reference::Tree(path) => {
            let path = std::path::absolute(path).context("cannot resolve the destination's path")?;
            let parent = path.parent().unwrap_or(&path).to_owned();
            std::fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
            tempfile::tempdir_in(parent)
        }
    };
    made.context("cannot make a directory for work files")
}

/// The layout that an image for `destination` is made in, and the tag that the destination names.
pub(crate) fn output(destination: &Reference, scratch: &TempDir) -> Result<(Layout, Option<String>)> {
    Ok(match destination {
        Reference::Layout { dir, tag } => (Layout::open_or_create(dir)?, tag.clone()),
        Reference::Archive { tag, .. } => (Layout::create(scratch.path().join("image"))?, tag.clone()),
        Reference::Registry(_) => (Layout::create(scratch.path().join("image"))?, None),
        Reference::Origin(name) => bail!("images are only read from {name}, not written"),
        Reference::Tree(dir) => bail!("{} is a plain directory and holds no image", dir.display()),
    })
}

/// `OS/ARCHITECTURE[/VARIANT]` on the command line.
pub(crate) fn platform(text: &str) -> Result<Platform, String> {
    Platform::parse(text)
        .ok_or_else(|| format!("`{text}` is no OS/ARCHITECTURE[/VARIANT], like linux/arm64/v8"))
}

fn show(bar: &ProgressBar) -> ProgressFn {
    let bar = bar.clone();
    Arc::new(move |progress| match progress {
        Progress::Start(blob) => crate::output::add_total(&bar, blob.size),
        Progress::Bytes(_, bytes) => bar.inc(bytes),
        Progress::Done(_) | Progress::Skipped(_) => {}
    })
}
