//! A repository at all the hosts that serve it: its mirrors, as `hosts.toml` lists them, and the registry itself.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::endpoint::Endpoint;
use super::hosts::{self, Host};
use super::{Registry, RegistryOptions};
use crate::digest::Digest;
use crate::oci::RawManifest;
use crate::reference::RegistryRef;
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency};
use crate::sources::{Health, Sources, first};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// A repository with its mirrors. Follows changes of `hosts.toml`; requests under way keep the hosts they have.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    reference: RegistryRef,
    options: RegistryOptions,
    current: Mutex<Current>,
}

struct Current {
    hosts: Hosts,
    looked: Instant,
    stamp: Option<Stamp>,
}

/// What tells one state of the file from another.
type Stamp = (PathBuf, Option<(SystemTime, u64)>);

#[derive(Clone)]
struct Hosts {
    blobs: Sources,
    registries: Arc<[(Registry, bool)]>,
}

impl Repository {
    /// A repository. No request is made yet.
    ///
    /// # Errors
    /// When `hosts.toml` or what it names cannot be used.
    pub fn new(reference: &RegistryRef, options: &RegistryOptions) -> Result<Self, SourceError> {
        let name = format!("{}/{}", reference.host(), reference.repository());
        let stamp = stamp(reference, options);
        let hosts = resolve(&name, reference, options)?;
        let current = Mutex::new(Current { hosts, looked: Instant::now(), stamp });
        let inner = Inner { name, reference: reference.clone(), options: options.clone(), current };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn hosts(&self) -> Hosts {
        let Inner { name, reference, options, current } = &*self.inner;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= LOOK {
            current.looked = Instant::now();
            let stamp = stamp(reference, options);
            if stamp != current.stamp {
                current.stamp = stamp;
                match resolve(name, reference, options) {
                    Ok(hosts) => current.hosts = hosts,
                    Err(error) => tracing::warn!("{error}; the hosts known before are used"),
                }
            }
        }
        current.hosts.clone()
    }

    /// Reads a manifest or index: by its digest from any host, by a tag from those that may be asked for tags.
    pub async fn manifest(&self, selector: &str) -> Result<RawManifest, SourceError> {
        let asked = self.asked(selector.parse::<Digest>().is_ok())?;
        first(self.name(), asked, Registry::name, |registry| async move { registry.manifest(selector).await })
            .await
    }

    /// Reads the index of what refers to a manifest, as a tag is looked up.
    pub async fn referrers(&self, digest: &Digest, artifact_type: &str) -> Result<RawManifest, SourceError> {
        let ask = |registry: Registry| async move { registry.referrers(digest, artifact_type).await };
        first(self.name(), self.asked(false)?, Registry::name, ask).await
    }

    /// The hosts for manifests: by digest any, else those that may be asked for what changes.
    fn asked(&self, by_digest: bool) -> Result<Vec<(Registry, Arc<Health>)>, SourceError> {
        let hosts = self.hosts();
        let asked: Vec<_> = hosts
            .registries
            .iter()
            .filter(|(_, resolves)| by_digest || *resolves)
            .map(|(registry, _)| (registry.clone(), registry.health()))
            .collect();
        if asked.is_empty() {
            let detail = "no host of hosts.toml has the capability `resolve`, so no tag can be looked up";
            return Err(SourceError::new(ErrorClass::Unsupported, self.name(), detail));
        }
        Ok(asked)
    }
}

/// The state of the file that speaks of a registry.
fn stamp(reference: &RegistryRef, options: &RegistryOptions) -> Option<Stamp> {
    let dir = hosts::directory(options.hosts_dir.as_deref()?, reference.host())?;
    let file = std::fs::metadata(dir.join("hosts.toml"));
    let state = file.ok().and_then(|file| Some((file.modified().ok()?, file.len())));
    Some((dir, state))
}

fn resolve(name: &str, reference: &RegistryRef, options: &RegistryOptions) -> Result<Hosts, SourceError> {
    let unusable = |detail: String| SourceError::new(ErrorClass::Unsupported, name, detail);
    let dir = options.hosts_dir.as_deref().and_then(|root| hosts::directory(root, reference.host()));
    let listed = match dir {
        Some(dir) => hosts::read(&dir, reference.host(), &options.http).map_err(unusable)?,
        None => {
            let endpoint = Endpoint::of_registry(reference.host(), &options.http).map_err(unusable)?;
            vec![Host { endpoint, resolve: true, pull: true }]
        }
    };
    // The registry itself comes last; it is what the peers' first one asks.
    let upstream = listed.iter().rev().find(|host| host.pull);
    let peers = match (&options.dragonfly, upstream) {
        (Some(dragonfly), Some(Host { endpoint, .. })) => {
            let endpoint = dragonfly.before(endpoint, &options.http).map_err(unusable)?;
            Some(Registry::at(endpoint, reference, options)?)
        }
        _ => None,
    };
    let mut registries = Vec::new();
    for Host { endpoint, resolve, pull } in listed {
        if endpoint.http.skip_verify {
            tracing::warn!("{}: certificates are not verified, as hosts.toml says", endpoint.host);
        }
        registries.push((Registry::at(endpoint, reference, options)?, resolve, pull));
    }
    Ok(Hosts::new(name, peers, registries))
}

impl Hosts {
    fn new(name: &str, peers: Option<Registry>, registries: Vec<(Registry, bool, bool)>) -> Self {
        let readable = registries.iter().filter(|(_, _, pull)| *pull).map(|(registry, ..)| registry);
        let member = |registry: &Registry| -> (Arc<dyn Source>, Arc<Health>) {
            (Arc::new(registry.clone()), registry.health())
        };
        let blobs = Sources::new(name, peers.iter().chain(readable).map(member));
        let named = registries.into_iter().filter(|(_, resolve, pull)| *resolve || *pull);
        Self { blobs, registries: named.map(|(registry, resolve, _)| (registry, resolve)).collect() }
    }
}

#[async_trait::async_trait]
impl Source for Repository {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn width(&self) -> u32 {
        self.hosts().blobs.width()
    }

    fn piece(&self, blob: &BlobRef) -> Option<u64> {
        self.hosts().blobs.piece(blob)
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, urgency: Urgency) -> Result<Body, SourceError> {
        self.hosts().blobs.read(blob, range, urgency).await
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        self.hosts().blobs.has(blob).await
    }
}
