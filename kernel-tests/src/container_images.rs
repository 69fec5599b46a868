//! Images for containers, in a registry: a Perl program plain and converted, and what pods run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};
use skimmer_vm_images::run;

use crate::debian_image::{self, PERL, TAG};
use crate::fixture::{Compression, Layer, Layout, Meta, unpack};
use crate::registry::{PACKAGE, Registry};
use crate::scenario::publish;

/// Debian packages that making them needs.
pub const PACKAGES: &[&str] = &[PACKAGE, "busybox-static", "e2fsprogs", "skopeo", "tar", "umoci"];
/// Files of which every container compares some.
const SAMPLES: usize = 60;

/// Images in a registry, and what some files of them hold.
pub struct ContainerImages {
    /// Where they are.
    pub registry: Registry,
    /// [`PERL`] as it is.
    pub plain: String,
    /// [`PERL`] converted.
    pub lazy: String,
    /// The image of pods.
    pub pause: String,
    /// Path in the image to digest.
    samples: Vec<(String, String)>,
    /// Bytes of the converted image.
    pub stored: u64,
    /// Its largest blob.
    pub data: String,
}

impl ContainerImages {
    /// Makes them in `scratch`, converts one with our `skimmer`, and pushes all.
    ///
    /// # Errors
    /// Something fails: the message says what.
    pub fn set(scratch: &Path) -> Result<Self> {
        let layout = debian_image::prepare(&PERL)?;
        let registry = Registry::start(&scratch.join("registry"))?;
        let (plain, lazy) = (registry.reference("perl:plain"), registry.reference("perl:lazy"));
        let source = format!("oci:{}:{TAG}", layout.display());
        push(&source, &plain)?;
        let converted = scratch.join("converted");
        publish(&source, &lazy, &converted)?;
        let blobs: Vec<(u64, String)> = fs::read_dir(converted.join("blobs/sha256"))?
            .map(|entry| {
                let entry = entry?;
                Ok((entry.metadata()?.len(), entry.file_name().to_string_lossy().into_owned()))
            })
            .collect::<Result<_>>()?;
        let stored = blobs.iter().map(|(length, _)| length).sum();
        let data = blobs.into_iter().max().map(|(_, name)| name).unwrap_or_default();
        let pause = registry.reference("pause:1");
        push(&format!("oci:{}:1", pause_image(scratch)?.display()), &pause)?;
        let rootfs = unpack(&layout, TAG, &scratch.join("bundle"))?;
        let samples = samples(&rootfs)?;
        fs::remove_dir_all(scratch.join("bundle"))?;
        Ok(Self { registry, plain, lazy, pause, samples, stored, data })
    }

    /// Whether a container sees the right bytes in every `step`th sample.
    ///
    /// # Errors
    /// It does not, or they cannot be asked.
    pub fn check(&self, first: usize, step: usize, exec: impl Fn(&[&str]) -> Result<String>) -> Result<()> {
        let wanted: Vec<_> = self.samples.iter().skip(first).step_by(step).collect();
        let mut command = vec!["sha256sum"];
        command.extend(wanted.iter().map(|(path, _)| path.as_str()));
        let said = exec(&command)?;
        let seen: Vec<_> = said.lines().filter_map(|line| line.split_once("  ")).collect();
        let wanted: Vec<_> = wanted.iter().map(|(path, digest)| (digest.as_str(), path.as_str())).collect();
        ensure!(seen == wanted, "wrong bytes:\n{seen:#?}\ninstead of\n{wanted:#?}");
        Ok(())
    }
}

fn push(source: &str, reference: &str) -> Result<()> {
    let to = format!("docker://{reference}");
    run(Command::new("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", source, &to]))?;
    Ok(())
}

/// The image of pods: a program that waits.
fn pause_image(scratch: &Path) -> Result<PathBuf> {
    let mut layer = Layer::default();
    layer.directory(b"bin", &Meta::new(0o755))?;
    layer.file(b"bin/busybox", &Meta::new(0o755), &fs::read("/bin/busybox")?)?;
    let directory = scratch.join("pause");
    Layout::create(&directory)?.image("1", &[(&layer.finish()?, Compression::Gzip)])?;
    let image = format!("{}:1", directory.display());
    let mut config = Command::new("umoci");
    config.args(["config", "--image", &image]);
    // It ends when it is told to, as the usual one does.
    for word in ["/bin/busybox", "sh", "-c", "trap exit TERM; /bin/busybox sleep 1000000 & wait"] {
        config.args(["--config.cmd", word]);
    }
    run(&mut config)?;
    Ok(directory)
}

/// Regular files all over the image, with their digests.
fn samples(rootfs: &Path) -> Result<Vec<(String, String)>> {
    let mut files = BTreeMap::new();
    let mut left = vec![rootfs.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (kind, path) = (entry.file_type()?, entry.path());
            if kind.is_dir() {
                left.push(path);
            } else if kind.is_file()
                && let Some(name) = path.strip_prefix(rootfs)?.to_str()
                && !name.contains(['\\', '\n'])
            {
                files.insert(format!("/{name}"), path);
            }
        }
    }
    ensure!(files.len() > SAMPLES, "too few files");
    let step = files.len() / SAMPLES;
    files
        .into_iter()
        .step_by(step)
        .map(|(name, path)| Ok((name, hex::encode(Sha256::digest(fs::read(path)?)))))
        .collect()
}
