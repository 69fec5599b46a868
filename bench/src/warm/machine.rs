//! A machine with the tree in all its forms, ready for contenders.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use erofs_format::Image;
use kernel_tests::machine::{GuestDisk, GuestSpec, Machine};
use skimmer_fetcher::image::{OpenOptions, open};
use skimmer_fetcher::reference::Reference;
use skimmer_mkfs::{MkfsError, device};
use skimmer_vm_images::cache::{Entry, Key};
use skimmer_vm_images::{apt, debian, disk, run};
use tempfile::TempDir;

use crate::contender::{SHORT, Stage, guest_programs, text};
use crate::data::{self, TreeSpec};
use crate::fuse;
use crate::run::Bench;

/// Debian packages of workloads, besides those that a source needs.
const TOOLS: &[&str] = &["coreutils", "dash", "fio", "tar"];

/// What contenders need.
pub(super) struct Prepared {
    /// `host 6.18.5` or `qemu 6.12.117`.
    pub(super) name: String,
    machine: Machine,
    programs: String,
    work: String,
    tree: String,
    store: String,
    fuse: String,
    tools: String,
    _scratch: TempDir,
}

impl Prepared {
    pub(super) fn new(bench: &Bench, tree: &TreeSpec, machine: &str) -> Result<Self> {
        let tree_path = data::tree(tree)?;
        // The cache of the benches lies on the machine's own file system, which /tmp need not do.
        let base = skimmer_vm_images::cache::root()?.join("work");
        fs::create_dir_all(&base)?;
        let scratch = tempfile::Builder::new().prefix("warm-").tempdir_in(&base)?;
        let store = scratch.path().join("store");
        fs::create_dir(&store)?;
        println!("  converting the tree");
        run(Command::new(bench.program("skimmer"))
            .args(["convert", "--quiet"])
            .arg(&tree_path)
            .arg(store.join("layout")))?;
        flatten(&store.join("layout"), &store.join("flat"))?;
        let packages = [TOOLS, tree.source.packages()].concat();
        let fuse = fuse::passthrough()?;
        bench.check()?;
        if machine == "host" {
            apt::ensure(&packages)?;
            let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
            return Ok(Prepared {
                name: format!("host {}", release.trim()),
                machine: Machine::host(),
                programs: text(bench.program("skimmer").parent().context("programs have a folder")?)?,
                work: text(scratch.path())?,
                tree: text(&tree_path)?,
                store: text(&store)?,
                fuse: text(&fuse)?,
                tools: "/".to_owned(),
                _scratch: scratch,
            });
        }
        let image = |name: &str| scratch.path().join(name);
        disk::from_directory(&image("tree"), &tree_path)?;
        disk::from_directory(&image("store.disk"), &store)?;
        fs::remove_dir_all(&store)?;
        disk::empty(&image("work"), 8 << 30)?;
        let mut programs = guest_programs(bench.program("skimmer").parent().context("a folder")?);
        programs.push(fuse);
        let mut spec = GuestSpec::new(machine, &bench.program("skimmer-agent"), programs);
        let mut add = |name, path: PathBuf, mount: &str, read_only| {
            spec.disks.push(GuestDisk { read_only, ..GuestDisk::new(name, &path, mount) });
        };
        // Everything that workloads read lies below the root of their programs.
        add("tools", tools(&packages)?, "/tools", true);
        add("work", image("work"), "/tools/mnt", false);
        add("tree", image("tree"), "/tools/mnt/tree", true);
        add("store", image("store.disk"), "/tools/mnt/store", true);
        let guest = spec.boot()?;
        for line in [
            "mount -t proc proc /tools/proc",
            "mount --bind /dev /tools/dev",
            "mount -t tmpfs tmpfs /tools/tmp",
        ] {
            guest.check(&["sh", "-c", line], SHORT)?;
        }
        let release = guest.check(&["uname", "-r"], SHORT)?;
        Ok(Prepared {
            name: format!("qemu {}", String::from_utf8_lossy(&release).trim()),
            machine: guest,
            programs: "/bin".to_owned(),
            work: "/tools/mnt".to_owned(),
            tree: "/tools/mnt/tree".to_owned(),
            store: "/tools/mnt/store".to_owned(),
            fuse: "/bin/passthrough_ll".to_owned(),
            tools: "/tools".to_owned(),
            _scratch: scratch,
        })
    }

    pub(super) fn stage(&self) -> Stage<'_> {
        Stage {
            machine: &self.machine,
            programs: self.programs.clone(),
            work: self.work.clone(),
            tree: self.tree.clone(),
            flat: format!("{}/flat", self.store),
            layout: format!("{}/layout", self.store),
            fuse: self.fuse.clone(),
            tools: self.tools.clone(),
        }
    }
}

/// The very image that Skimmer mounts, as one file for plain mounts.
fn flatten(layout: &Path, flat: &Path) -> Result<()> {
    let reference = Reference::parse_source(&format!("oci:{}", text(layout)?))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let remote = runtime.block_on(open(&reference, &OpenOptions::default()))?;
    let image = Image::parse(&remote.bootstrap)?;
    let blobs = layout.join("blobs/sha256");
    let mut out = BufWriter::new(File::create(flat)?);
    let stored = |index: usize| {
        let id = image.blobs().get(index).map_or_else(String::new, |blob| blob.id.to_string());
        let path = blobs.join(&id);
        File::open(&path).map_err(|error| MkfsError::Device { blob: id, reason: error.to_string() })
    };
    device::flatten(&image, stored, &mut out)?;
    Ok(())
}

/// A disk with the workloads' programs.
fn tools(packages: &[&str]) -> Result<PathBuf> {
    let root = debian::root(packages)?;
    let mut key = Key::new("tools disk");
    key.add(root.as_os_str().as_encoded_bytes());
    let entry = Entry::new("disks", &key.finish())?
        .get_or_make(|aside| disk::from_directory(&aside.join("tools"), &root))?;
    Ok(entry.join("tools"))
}
