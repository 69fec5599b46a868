//! A registry with the images of a scenario, the link to it, and the machine on this side.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use kernel_tests::debian_image::{self, Program};
use kernel_tests::fixture;
use kernel_tests::machine::{GuestDisk, GuestSpec, Machine};
use kernel_tests::registry::Registry;
use serde_json::Value;
use skimmer_fetcher::image::{OpenOptions, open};
use skimmer_fetcher::reference::Reference;
use skimmer_vm_images::{disk, run};
use tempfile::TempDir;

use super::LinkSpec;
use super::contender::{Fresh, Ours, PLAIN, SLOTS, TRACED};
use super::slots;
use crate::contender::{SHORT, guest_programs, text};
use crate::content;
use crate::data::SEED;
use crate::link::Link;
use crate::probe::{self, Sum};
use crate::run::Bench;

/// The registry's port, at the far end.
const PORT: u16 = 5000;
/// The large file of `misses`.
pub(super) const FILE: &str = "file.bin";

/// One image in the registry, in both forms.
pub(super) struct Published {
    pub(super) name: String,
    pub(super) program: Option<&'static Program>,
    /// Layers of the original image: digest and size, in order.
    pub(super) layers: Vec<(String, u64)>,
    /// Data blobs of the converted image.
    pub(super) blobs: Vec<(String, u64)>,
    /// The original's tree, unpacked by another implementation.
    pub(super) expected: Option<Sum>,
    /// The layout of the converted image.
    pub(super) converted: PathBuf,
}

impl Published {
    /// The bootstrap of the converted image.
    pub(super) fn bootstrap(&self) -> Result<Vec<u8>> {
        let reference = Reference::parse_source(&format!("oci:{}", text(&self.converted)?))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(open(&reference, &OpenOptions::default()))?.bootstrap)
    }
}

/// Everything that outlives a link.
pub(super) struct World {
    pub(super) name: String,
    pub(super) machine: Machine,
    /// Folders on the machine: our programs, and one on a real file system.
    pub(super) programs: String,
    /// Other builds of ours: contender and folder of programs.
    pub(super) variants: Vec<(String, String)>,
    pub(super) work: String,
    pub(super) images: Vec<Published>,
    pub(super) guest: bool,
    scratch: TempDir,
    nodes: AtomicU32,
}

/// The registry through a link.
pub(super) struct Far {
    // Dropped first: it lives at the link's far end.
    pub(super) registry: std::cell::RefCell<Registry>,
    pub(super) link: Link,
    /// The link's words.
    pub(super) case: String,
    /// The only images that are worth its time; all when absent.
    images: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(bench: &Bench, machine: &str) -> Result<Self> {
        let base = skimmer_vm_images::cache::root()?.join("work");
        fs::create_dir_all(&base)?;
        let scratch = tempfile::Builder::new().prefix("cold-").tempdir_in(&base)?;
        let programs = bench.program("skimmer");
        let programs = programs.parent().context("programs have a folder")?;
        let guest = machine != "host";
        let (name, machine, programs, work) = if guest {
            let work = scratch.path().join("work.disk");
            disk::empty(&work, 8 << 30)?;
            let mut spec = GuestSpec::new(machine, &bench.program("skimmer-agent"), guest_programs(programs));
            spec.disks.push(GuestDisk::new("work", &work, "/work"));
            let guest = spec.boot()?;
            let release = guest.check(&["uname", "-r"], SHORT)?;
            let name = format!("qemu {}", String::from_utf8_lossy(&release).trim());
            (name, guest, "/bin".to_owned(), "/work".to_owned())
        } else {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
            let work = scratch.path().join("work");
            fs::create_dir(&work)?;
            (format!("host {}", release.trim()), Machine::host(), text(programs)?, text(&work)?)
        };
        let (images, nodes) = (Vec::new(), AtomicU32::new(0));
        let variants = bench.variants().iter();
        let variants =
            variants.map(|(name, folder)| Ok((name.clone(), text(folder)?))).collect::<Result<_>>()?;
        Ok(World { name, machine, programs, variants, work, images, guest, scratch, nodes })
    }

    /// Converts an image of Debian packages and puts both forms into the registry.
    pub(super) fn publish(&mut self, bench: &Bench, name: &str, traced: bool, split: bool) -> Result<()> {
        bench.check()?;
        println!("  publishing {name}");
        let program = debian_image::find(name)?;
        let layout = debian_image::prepare(program)?;
        let source = format!("oci:{}:{}", text(&layout)?, debian_image::TAG);
        let converted = self.scratch.path().join(format!("{name}.converted"));
        convert(bench, &source, &converted)?;
        let unpacked = self.scratch.path().join(format!("{name}.unpacked"));
        let root = fixture::unpack(&layout, debian_image::TAG, &unpacked)?;
        let expected = probe::sum(&root, &[])?;
        let registry = self.local_registry()?;
        if split {
            let layout = self.scratch.path().join(format!("{name}.layers"));
            slots::split(&root, &layout)?;
            let converted = self.scratch.path().join(format!("{name}.slots"));
            convert(bench, &format!("oci:{}:{}", text(&layout)?, debian_image::TAG), &converted)?;
            push(bench, &registry, &converted, &format!("{name}:{SLOTS}"))?;
        }
        fs::remove_dir_all(&unpacked)?;
        let original = format!("docker://{}", registry.reference(&format!("{name}:original")));
        run(Command::new("skopeo").args(["copy", "-q", "--dest-tls-verify=false", &source, &original]))?;
        push(bench, &registry, &converted, &format!("{name}:{PLAIN}"))?;
        if traced {
            let ours = Ours::of(self, "skimmer-fanotify").context("a contender of ours")?;
            let start = |point: &str| super::start::start(self, program, point).map(drop);
            let recording = Fresh::new(self, &ours)?.trace(&text(&converted)?, start)?;
            let trace = self.scratch.path().join(format!("{name}.trace"));
            fs::write(&trace, recording)?;
            let optimized = self.scratch.path().join(format!("{name}.traced"));
            let mut optimize = Command::new(bench.program("skimmer"));
            optimize.args(["optimize", "--quiet", "--trace"]).arg(&trace).arg(&converted).arg(&optimized);
            run(&mut optimize)?;
            push(bench, &registry, &optimized, &format!("{name}:{TRACED}"))?;
        }
        self.images.push(Published {
            name: name.to_owned(),
            program: Some(program),
            layers: layers(&layout)?,
            blobs: blobs(&converted)?,
            expected: Some(expected),
            converted,
        });
        Ok(())
    }

    /// Converts a folder with one file of so many chunks of 1 MiB, and puts it into the registry.
    pub(super) fn publish_file(&mut self, bench: &Bench, chunks: u64) -> Result<()> {
        let tree = self.scratch.path().join("tree");
        fs::create_dir(&tree)?;
        let mut file = std::io::BufWriter::new(fs::File::create(tree.join(FILE))?);
        content::write(SEED, chunks * 256, &mut file)?;
        drop(file.into_inner()?);
        let converted = self.scratch.path().join("file.converted");
        run(Command::new(bench.program("skimmer")).args(["convert", "--quiet"]).arg(&tree).arg(&converted))?;
        fs::remove_dir_all(&tree)?;
        let registry = self.local_registry()?;
        push(bench, &registry, &converted, &format!("file:{PLAIN}"))?;
        self.images.push(Published {
            name: "file".to_owned(),
            program: None,
            layers: Vec::new(),
            blobs: blobs(&converted)?,
            expected: None,
            converted,
        });
        Ok(())
    }

    fn local_registry(&self) -> Result<Registry> {
        Registry::start(&self.scratch.path().join("registry"))
    }

    /// Makes a link and starts the registry behind it.
    pub(super) fn connect(&self, spec: &LinkSpec) -> Result<Far> {
        let shape = spec.shape();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("skimmer-bench-{}-{number}", std::process::id());
        let link = Link::new(&namespace, shape)?;
        let directory = self.scratch.path().join(&namespace);
        let address = SocketAddr::from((link.far(), PORT));
        let content = self.scratch.path().join("registry");
        let registry = Registry::start_by(link.at_far("docker-registry"), &directory, &content, address)?;
        let (registry, case) = (std::cell::RefCell::new(registry), shape.to_string());
        Ok(Far { registry, link, case, images: spec.images.clone() })
    }

    /// A folder on the machine that no other contender or round has.
    pub(super) fn fresh(&self) -> String {
        format!("{}/{}", self.work, self.nodes.fetch_add(1, Ordering::Relaxed))
    }

    /// Forgets what this host's and the machine's kernel keep of files; the registry's content is read again, so that
    /// its disk does not count.
    pub(super) fn forget(&self) -> Result<()> {
        let drop_caches = format!("{}/skimmer-probe", self.programs);
        self.machine.check(&[&drop_caches, "drop-caches"], SHORT)?;
        probe::sum(&self.scratch.path().join("registry"), &[]).map(drop)
    }
}

impl Far {
    /// Whether an image is measured over this link.
    pub(super) fn wants(&self, image: &Published) -> bool {
        self.images.as_ref().is_none_or(|images| images.contains(&image.name))
    }

    /// Requests that the registry has answered so far.
    pub(super) fn requests(&self) -> Result<usize> {
        Ok(self.registry.borrow_mut().requests()?.len())
    }

    /// The address of a blob of an image.
    pub(super) fn url(&self, image: &str, digest: &str) -> String {
        format!("http://{}/v2/{image}/blobs/{digest}", self.registry.borrow().address())
    }
}

fn convert(bench: &Bench, source: &str, into: &std::path::Path) -> Result<()> {
    run(Command::new(bench.program("skimmer")).args(["convert", "--quiet", source]).arg(into)).map(drop)
}

fn push(bench: &Bench, registry: &Registry, converted: &std::path::Path, name: &str) -> Result<()> {
    let reference = registry.reference(name);
    run(Command::new(bench.program("skimmer")).args(["push", "--quiet"]).arg(converted).arg(reference))
        .map(drop)
}

/// (digest, size) of the layers of a layout's only image.
fn layers(layout: &std::path::Path) -> Result<Vec<(String, u64)>> {
    let manifest = manifest(layout)?;
    manifest["layers"].as_array().context("no layers")?.iter().map(descriptor).collect()
}

/// Those that hold data: the bootstrap is marked.
fn blobs(layout: &std::path::Path) -> Result<Vec<(String, u64)>> {
    let manifest = manifest(layout)?;
    let layers = manifest["layers"].as_array().context("no layers")?.iter();
    let is_bootstrap = |layer: &&Value| {
        let annotations = layer["annotations"].as_object();
        annotations.is_some_and(|map| map.keys().any(|key| key.ends_with("bootstrap")))
    };
    layers.filter(|layer| !is_bootstrap(layer)).map(descriptor).collect()
}

fn manifest(layout: &std::path::Path) -> Result<Value> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().context("an index without manifest")?;
    let path = layout.join("blobs").join(digest.replace(':', "/"));
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn descriptor(layer: &Value) -> Result<(String, u64)> {
    let digest = layer["digest"].as_str().context("a layer without digest")?.to_owned();
    Ok((digest, layer["size"].as_u64().context("a layer without size")?))
}
