//! From an image's name to what is needed to mount it. Everything here comes from outside and is checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use erofs_format::Image;
use futures_util::{StreamExt as _, stream};
use skimmer_client::{Credentials, MountRequest, Record};
use skimmer_fetcher::Digest;
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::credentials::Secret;
use skimmer_fetcher::http::{HttpOptions, Timeouts};
use skimmer_fetcher::image::{self, Found, ImageError, OpenOptions};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::origin::Origin;
use skimmer_fetcher::reference::Reference;
use skimmer_fetcher::registry::{RegistryOptions, Repository};
use skimmer_fetcher::signature;
use skimmer_fetcher::source::{BlobRef, Source, Urgency};
use tokio::sync::oneshot;

use super::early::Early;
use super::{Failure, Kind, Mounts};
use crate::blob::{BlobId, BlobSpec};
use crate::pulls::credential;
use crate::requests::Ahead;
use crate::store::bootstraps;
use crate::store::records::{BlobRecord, ImageRecord, SourceRecord};

/// Blobs that are asked for at once.
const BLOBS_AT_ONCE: usize = 8;

/// Bytes of start blobs that may be in memory before their bootstraps are there, for all mounts together.
pub(super) const AHEAD: u32 = 8 << 20;

/// An image that was resolved, fetched as far as it has to be, and checked.
pub struct Opened {
    /// What is recorded of it.
    pub image: ImageRecord,
    /// The whole bootstrap.
    pub bootstrap: Vec<u8>,
    /// Its blobs in device order.
    pub specs: Vec<BlobSpec>,
    /// What it wants fetched early.
    pub early: Early,
    /// Where the blobs come from.
    pub source: Arc<dyn Source>,
}

/// The blobs of a bootstrap, in device order. `stored` gives the size of a blob at its source.
///
/// # Errors
/// When the bootstrap breaks a rule, or names a blob that is not there.
pub fn specs(bootstrap: &[u8], stored: &HashMap<BlobId, u64>) -> Result<Vec<BlobSpec>, Failure> {
    let image = Image::parse(bootstrap).map_err(|error| bad(format!("the bootstrap is damaged: {error}")))?;
    specs_of(&image, stored)
}

fn bad(message: String) -> Failure {
    Failure::new(Kind::BadImage, message).remedy("convert the image again, and check it with `skimmer check`")
}

fn unsigned(error: &ImageError) -> Failure {
    Failure::new(Kind::BadImage, error.to_string())
        .remedy("have it signed, `cosign sign --key KEY IMAGE@DIGEST`, or see `signatures.required` in the configuration")
}

fn specs_of(image: &Image<'_>, stored: &HashMap<BlobId, u64>) -> Result<Vec<BlobSpec>, Failure> {
    image.check().map_err(|error| bad(format!("the bootstrap is damaged: {error}")))?;
    let mut specs: Vec<BlobSpec> = Vec::new();
    for (slot, blob) in image.blobs().iter().enumerate() {
        let id = BlobId::new(blob.id.0);
        if specs.iter().any(|spec| spec.id == id) {
            return Err(bad(format!("the bootstrap names blob {id} twice")));
        }
        let stored = stored.get(&id).copied();
        let stored =
            stored.ok_or_else(|| bad(format!("the image needs blob {id}, which is not among its layers")))?;
        let chunks = image
            .chunk_map(slot)
            .map_err(|error| bad(format!("the bootstrap is damaged: blob {id}: {error}")))?;
        let device_bytes = u64::from(blob.blocks)
            .checked_mul(crate::blob::BLOCK)
            .ok_or_else(|| bad(format!("the bootstrap is damaged: blob {id} is too large")))?;
        let spec = BlobSpec::new(id, device_bytes, stored, &chunks, blob.compressor, blob.digest)
            .map_err(|error| bad(format!("the bootstrap is damaged: {error}")))?;
        specs.push(spec);
    }
    Ok(specs)
}

impl Mounts {
    /// Resolves the image of a request.
    pub(super) async fn open(&self, request: &MountRequest) -> Result<Opened, Failure> {
        let reference = parse(&request.image)?;
        let registry = self.registry_options(
            &reference,
            request.credentials.as_ref(),
            &request.insecure,
            request.ca.as_deref(),
        );
        let (required, image) = (self.config.signatures.required.clone(), reference.clone());
        let signed_by = tokio::task::spawn_blocking(move || signature::required(&required, &image))
            .await?
            .map_err(|error| Failure::new(Kind::Internal, format!("signatures.required: {error}")))?;
        let chain_id = request.chain_id.as_deref().map(str::parse).transpose();
        let chain_id =
            chain_id.map_err(|error| Failure::new(Kind::BadRequest, format!("`chain_id`: {error}")))?;
        let options = OpenOptions {
            registry,
            signed_by,
            chain_id,
            max_bootstrap: bootstraps::MAX_BYTES,
            // The bootstrap is checked by the manifest.
            config: false,
            ..OpenOptions::default()
        };
        let limit = self.config.mount.open_timeout();
        let failed = |message: String| Failure::new(Kind::Source, message);
        let opening = async {
            let found = image::find(&reference, &options).await?;
            let ahead = self.read_ahead_of_bootstrap(&found, &reference, request);
            Ok::<_, ImageError>((ahead, found.open().await?))
        };
        let (ahead, remote) = tokio::time::timeout(limit, opening)
            .await
            .map_err(|_| failed(format!("{}: did not answer within {} s", request.image, limit.as_secs())))?
            .map_err(|error| match error {
                ImageError::Unsigned { .. } => unsigned(&error),
                ImageError::Source { .. } | ImageError::Layout { .. } | ImageError::Archive { .. } => {
                    failed(error.to_string())
                }
                // Asking again would give the same.
                ImageError::Document { .. }
                | ImageError::Tree(_)
                | ImageError::NotConverted { .. }
                | ImageError::Part { .. } => Failure::new(Kind::BadImage, error.to_string()),
            })?;
        let stored: HashMap<BlobId, u64> =
            remote.blobs.iter().map(|blob| (BlobId::new(*blob.digest.as_bytes()), blob.size)).collect();
        let bootstrap = remote.bootstrap;
        let check = move || {
            let damaged = |error| bad(format!("the bootstrap is damaged: {error}"));
            let image = Image::parse(&bootstrap).map_err(damaged)?;
            let specs = specs_of(&image, &stored)?;
            let early = Early::listed(&image, &specs);
            Ok((specs, early, bootstrap))
        };
        let (specs, early, bootstrap) =
            tokio::task::spawn_blocking(check).await?.map_err(|failure: Failure| Failure {
                message: format!("{}: {}", request.image, failure.message),
                ..failure
            })?;
        if let Some(ahead) = ahead
            && let Some(spec) = specs.iter().find(|spec| spec.id.bytes() == ahead.blob.as_bytes())
        {
            let ends =
                spec.chunks.iter().map(|chunk| chunk.spec.stored_offset + u64::from(chunk.spec.stored_len));
            self.driver.offer(ahead, ends.max().unwrap_or_default()).await?;
        }
        let image = ImageRecord {
            bootstrap: bootstraps::name(&bootstrap),
            sources: vec![SourceRecord {
                image: request.image.clone(),
                manifest: remote.manifest_digest.to_string(),
                insecure: request.insecure.clone(),
                ca: request.ca.clone(),
            }],
            blobs: specs
                .iter()
                .map(|spec| BlobRecord { id: spec.id.hex(), stored_bytes: spec.stored_bytes })
                .collect(),
        };
        Ok(Opened { image, bootstrap, specs, early, source: remote.source })
    }

    /// Fetches the bootstrap of that name once more. It was good when its image was first mounted: the name is its digest.
    pub(super) async fn bootstrap_of(&self, source: &SourceRecord, name: &str) -> Result<Vec<u8>, Failure> {
        let failed = |why: String| Failure::new(Kind::Source, format!("{}: {why}", source.image));
        let mut reference = parse(&source.image)?;
        let login = {
            let secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
            secrets.get(&source.image).cloned()
        };
        let registry =
            self.registry_options(&reference, login.as_ref(), &source.insecure, source.ca.as_deref());
        // A tag may mean something else by now.
        if let (Reference::Registry(name), Ok(manifest)) = (&reference, source.manifest.parse()) {
            reference = Reference::Registry(name.with_digest(manifest));
        }
        let max_bootstrap = bootstraps::MAX_BYTES;
        let options = OpenOptions { registry, max_bootstrap, config: false, ..OpenOptions::default() };
        let limit = self.config.mount.open_timeout();
        let remote = tokio::time::timeout(limit, image::open(&reference, &options)).await;
        let remote = remote.map_err(|_| failed(format!("did not answer within {} s", limit.as_secs())))?;
        let bytes = remote.map_err(|error| failed(error.to_string()))?.bootstrap;
        let sum = {
            let bytes = bytes.clone();
            tokio::task::spawn_blocking(move || bootstraps::name(&bytes)).await?
        };
        if sum == name { Ok(bytes) } else { Err(failed(format!("its bootstrap is another one now: {sum}"))) }
    }

    /// Asks for the start blob while the bootstrap is on its way: what is in it is known when that has come.
    fn read_ahead_of_bootstrap(
        &self,
        found: &Found,
        reference: &Reference,
        request: &MountRequest,
    ) -> Option<Ahead> {
        let is_remote = matches!(reference, Reference::Registry(_) | Reference::Origin(_));
        let wanted = self.config.prefetch.listed && request.record != Some(Record::Exact);
        let blob = found.start_blob().filter(|_| is_remote && wanted)?;
        if self.store.claims_path(BlobId::new(*blob.digest.as_bytes())).exists() {
            return None;
        }
        let (source, (sender, body)) = (Arc::clone(found.source()), oneshot::channel());
        let room = Arc::clone(&self.ahead);
        let name = source.name().to_owned();
        tokio::spawn(async move {
            match source.read(&blob, 0..blob.size, Urgency::Ahead).await {
                // Nobody may want it any more.
                Ok(body) => drop(sender.send(body.ahead(room, AHEAD))),
                Err(error) => tracing::debug!(blob = %blob.digest, "not read ahead: {error}"),
            }
        });
        Some(Ahead { blob: blob.digest, source: name, body })
    }

    /// Makes sure that each blob of the image that is mounted there is in the cache, or a source has it. One that cannot
    /// be asked may have it.
    ///
    /// # Errors
    /// None has one of them.
    pub async fn find_blobs(&self, target: &Path) -> Result<(), Failure> {
        let (image, file_mode, specs) = {
            let state = self.state.lock().await;
            let mounted =
                state.attachments.iter().find(|a| a.record.mounts.iter().any(|m| m.target == target));
            let Some(mounted) = mounted else { return Ok(()) };
            (mounted.image.clone(), mounted.file_mode(), mounted.specs.clone())
        };
        let mut wanted = Vec::new();
        for spec in specs {
            let ready = self.journal.recorded(file_mode, spec.id).await;
            if !ready.is_some_and(|ready| spec.is_complete(&ready)) {
                wanted.push(spec);
            }
        }
        let sources = self.sources(&image);
        let mut missing = stream::iter(wanted)
            .map(|spec| {
                let sources = sources.clone();
                let blob = BlobRef { digest: Digest::from_bytes(*spec.id.bytes()), size: spec.stored_bytes };
                async move {
                    for source in &sources {
                        match source.has(&blob).await {
                            Ok(false) => {}
                            Ok(true) => return None,
                            Err(error) => {
                                tracing::warn!(%blob, "whether it is there is not known: {error}");
                                return None;
                            }
                        }
                    }
                    Some(blob.digest)
                }
            })
            .buffer_unordered(BLOBS_AT_ONCE)
            .filter_map(std::future::ready);
        let missing = tokio::time::timeout(self.config.mount.open_timeout(), missing.next()).await;
        let Some(digest) = missing.ok().flatten() else { return Ok(()) };
        let names: Vec<&str> = sources.iter().map(|source| source.name()).collect();
        let message = format!("blob {digest} of the image is not at {}", names.join(" or "));
        Err(Failure::new(Kind::Source, message).remedy("push the image again"))
    }

    /// The source of an image that is mounted already, without asking it anything: it may be down just now.
    pub(super) fn source_of(
        &self,
        record: &SourceRecord,
        login: Option<&Credentials>,
    ) -> Result<Arc<dyn Source>, Failure> {
        let failed =
            |why: &dyn std::fmt::Display| Failure::new(Kind::Source, format!("{}: {why}", record.image));
        let reference = parse(&record.image)?;
        let options = self.registry_options(&reference, login, &record.insecure, record.ca.as_deref());
        Ok(match reference {
            Reference::Registry(name) => {
                Arc::new(Repository::new(&name, &options).map_err(|error| failed(&error))?)
            }
            Reference::Origin(name) => {
                Arc::new(Origin::new(&name, &options).map_err(|error| failed(&error))?)
            }
            Reference::Layout { dir, .. } => Arc::new(Layout::open(dir).map_err(|error| failed(&error))?),
            Reference::Archive { file, .. } => Arc::new(Archive::open(file).map_err(|error| failed(&error))?),
            Reference::Tree(_) => return Err(failed(&"is a plain directory")),
        })
    }

    fn registry_options(
        &self,
        reference: &Reference,
        login: Option<&Credentials>,
        insecure: &[String],
        ca: Option<&Path>,
    ) -> RegistryOptions {
        let config = &self.config.registry;
        let mut options = RegistryOptions {
            http: HttpOptions {
                timeouts: Timeouts::on_demand(),
                insecure: config.insecure.iter().chain(insecure).cloned().collect(),
                extra_ca: config.ca.iter().map(PathBuf::as_path).chain(ca).map(Path::to_owned).collect(),
                version: config.http,
                ..HttpOptions::default()
            },
            pool: self.pool.clone(),
            hosts_dir: Some(config.hosts_dir.clone()).filter(|dir| !dir.as_os_str().is_empty()),
            spool_dir: Some(self.config.root.clone()),
            // What is wrong with it was said when the configuration was read.
            dragonfly: self.config.dragonfly.source().ok().flatten(),
            s3: config.s3.iter().map(|(key, value)| (key.clone(), Secret::new(value))).collect(),
            ..RegistryOptions::default()
        };
        if let Some(providers) = &config.credential_providers {
            options.credentials = options.credentials.with_kubelet(&providers.config, &providers.bin_dir);
        }
        options.credentials = options.credentials.with_logins(self.pulls.clone());
        if let (Some(login), Some(host)) = (login, reference.host()) {
            options.credentials = options.credentials.with_credential(&host, credential(login));
        }
        options
    }
}

/// Reads an image's name. Paths must be absolute, because the daemon's working directory is not the caller's.
fn parse(name: &str) -> Result<Reference, Failure> {
    let bad = |message: String| Failure::new(Kind::BadRequest, message);
    let reference = Reference::parse_source(name).map_err(|error| bad(error.to_string()))?;
    match &reference {
        Reference::Tree(dir) => Err(bad(format!("{} is a plain directory, not an image", dir.display()))
            .remedy("pack it first: skimmer convert DIR IMAGE")),
        Reference::Layout { dir: path, .. } | Reference::Archive { file: path, .. }
            if !path.is_absolute() =>
        {
            Err(bad(format!("image `{name}`: {} is not an absolute path", path.display())))
        }
        _ => Ok(reference),
    }
}
