//! The demo's image: a Python image of three layers, made of Debian packages, as an OCI layout in the user's cache.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use skimmer_vm_images::{apt, cache, run};

/// Changes whenever this file makes other bytes from the same packages.
const RECIPE: &str = "1";
const BASE: &[&str] = &[
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "sed",
    "tar",
    "util-linux",
];
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "git",
    "media-types",
    "python3",
    "python3-jinja2",
    "python3-numpy",
    "python3-pandas",
    "python3-requests",
    "python3-scipy",
    "python3-sqlalchemy",
    "python3-yaml",
];
/// The application: it uses a few modules of a large image, as containers do.
const APPLICATION: &str = r#"import json, sqlite3, sys
import jinja2, numpy, requests
page = jinja2.Template("{{ n }} squares sum to {{ s }}").render(n=10, s=int((numpy.arange(10) ** 2).sum()))
print(json.dumps({"python": sys.version.split()[0], "requests": requests.__version__, "page": page}), flush=True)
"#;
/// What the application prints contains this.
pub const EXPECTED: &str = "10 squares sum to 285";
/// The command line that runs it in the image's root.
pub const RUN: &[&str] = &["/usr/bin/python3", "-B", "/app/main.py"];

/// The image's tag in its layout.
pub const TAG: &str = "latest";

/// Makes the image if the cache does not hold it; returns its OCI layout.
///
/// # Errors
/// A package cannot be fetched, a file cannot be written, or we are not root.
pub fn prepare() -> Result<PathBuf> {
    make().or_else(|first| {
        // Missing or outdated package lists are the usual reason for a first failure.
        apt::update().with_context(|| format!("after {first:#}"))?;
        make()
    })
}

fn make() -> Result<PathBuf> {
    let base = resolve(BASE, &[])?;
    let packages = resolve(PACKAGES, &base)?;
    let mut key = Sha256::new();
    for text in [RECIPE, APPLICATION].into_iter().chain(base.iter().chain(&packages).map(String::as_str)) {
        key.update(text.as_bytes());
        key.update([0]);
    }
    let cache = cache::root()?.join("demo");
    let layout = cache.join(hex::encode(key.finalize()));
    if layout.join("index.json").exists() {
        return Ok(layout);
    }
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    eprintln!("making the demo image of {} Debian packages (once)", base.len() + packages.len());
    let work = tempfile::tempdir_in(&cache).context("cannot make a work folder in the cache")?;
    let built = work.path().join("layout");
    fs::create_dir_all(built.join("blobs/sha256"))?;
    let mut layers = Vec::new();
    for (name, packages) in [("base", &base), ("packages", &packages)] {
        let root = work.path().join(name);
        unpack(packages, &work.path().join("debs"), &root)?;
        if name == "packages" {
            // Debian's alternatives system sets these links at installation time.
            let libraries = root.join("usr/lib/x86_64-linux-gnu");
            for library in ["blas", "lapack"] {
                let file = format!("lib{library}.so.3");
                symlink(format!("{library}/{file}"), libraries.join(&file))?;
            }
        }
        layers.push(pack(&root, &built)?);
    }
    let application = work.path().join("application");
    application_layer(&application)?;
    layers.push(pack(&application, &built)?);
    write_layout(&built, &layers)?;
    match fs::rename(&built, &layout) {
        // Another run may have made it meanwhile: the content is the same.
        Err(_) if layout.join("index.json").exists() => {}
        result => result.with_context(|| format!("cannot put the image at {}", layout.display()))?,
    }
    Ok(layout)
}

/// The packages that `names` need on an empty system, `name=version`, without those in `without`.
fn resolve(names: &[&str], without: &[String]) -> Result<Vec<String>> {
    let mut simulate = Command::new("apt-get");
    simulate.env("LC_ALL", "C").args(["-s", "-o", "Dir::State::status=/dev/null"]);
    let plan = run(simulate.args(["-o", "APT::Install-Recommends=false", "install"]).args(names))?;
    let mut found: Vec<String> = String::from_utf8_lossy(&plan)
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("Inst ")?.split(' ');
            let (name, version) = (words.next()?, words.next()?.strip_prefix('(')?);
            Some(format!("{name}={version}"))
        })
        .filter(|package| !without.contains(package))
        .collect();
    found.sort();
    Ok(found)
}

fn unpack(packages: &[String], debs: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(debs)?;
    fs::create_dir_all(root)?;
    // The sandbox user cannot write into our directory; apt only warns, but at length.
    let mut download = Command::new("apt-get");
    download.args(["download", "-q", "-o", "APT::Sandbox::User=root"]);
    run(download.args(packages).current_dir(debs))?;
    let mut files: Vec<PathBuf> =
        fs::read_dir(debs)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for deb in files {
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(root))?;
        fs::remove_file(&deb)?;
    }
    Ok(())
}

/// The program, a whiteout of a directory and of a file, an opaque directory, a hard link and a capability.
fn application_layer(root: &Path) -> Result<()> {
    for dir in ["app/data", "tmp", "usr/share", "usr/share/man", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::write(root.join("app/main.py"), APPLICATION)?;
    fs::hard_link(root.join("app/main.py"), root.join("app/entry.py"))?;
    fs::write(root.join("app/helper"), "#!/bin/sh\nexec /usr/bin/python3 /app/main.py\n")?;
    fs::set_permissions(root.join("app/helper"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("app/data/zeros"), vec![0_u8; 3 << 20])?;
    // cap_net_bind_service, permitted and effective (revision 2 of the on-disk form).
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let helper = root.join("app/helper");
    rustix::fs::setxattr(&helper, "security.capability", &capability, rustix::fs::XattrFlags::empty())
        .context("cannot set a capability (needs root)")?;
    fs::write(root.join("usr/share/.wh.doc"), "")?;
    fs::write(root.join("usr/share/man/.wh..wh..opq"), "")?;
    fs::write(root.join("etc/.wh.issue"), "")?;
    fs::write(root.join("etc/hostname"), "demo\n")?;
    Ok(())
}

struct Layer {
    descriptor: Value,
    diff_id: String,
}

/// Packs `root` as one gzip layer into `layout`, the same bytes each time.
fn pack(root: &Path, layout: &Path) -> Result<Layer> {
    let tar = layout.join("layer.tar");
    let mut pack = Command::new("tar");
    pack.args(["--sort=name", "--mtime=@1700000000", "--numeric-owner"]);
    pack.args(["--owner=0", "--group=0", "--xattrs", "--xattrs-include=*", "--format=posix"]);
    pack.args(["--pax-option=delete=atime,delete=ctime", "-cf"]).arg(&tar).arg("-C").arg(root).arg(".");
    run(&mut pack)?;
    let diff_id = hash_file(&tar)?;
    let gzip = layout.join("layer.tar.gz");
    let mut compress = Command::new("gzip");
    let status = compress
        .args(["-n", "-6", "-c"])
        .stdin(Stdio::null())
        .arg(&tar)
        .stdout(fs::File::create(&gzip)?)
        .status()?;
    anyhow::ensure!(status.success(), "gzip failed: {status}");
    fs::remove_file(&tar)?;
    let digest = hash_file(&gzip)?;
    let size = fs::metadata(&gzip)?.len();
    fs::rename(&gzip, layout.join("blobs/sha256").join(&digest))?;
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    let descriptor = json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size});
    Ok(Layer { descriptor, diff_id: format!("sha256:{diff_id}") })
}

fn hash_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(path)?;
    std::io::copy(&mut file, &mut HashWriter(&mut hash))?;
    Ok(hex::encode(hash.finalize()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn write_layout(layout: &Path, layers: &[Layer]) -> Result<()> {
    let diff_ids: Vec<&String> = layers.iter().map(|layer| &layer.diff_id).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": RUN, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": layers.iter().map(|_| json!({"created_by": "cargo xtask demo"})).collect::<Vec<_>>(),
    });
    let config = put(layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let descriptors: Vec<&Value> = layers.iter().map(|layer| &layer.descriptor).collect();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": descriptors,
    });
    let mut manifest = put(layout, &manifest, media_type)?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": TAG});
    fs::write(layout.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(())
}

fn put(layout: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let bytes = value.to_string();
    let digest = hex::encode(Sha256::digest(bytes.as_bytes()));
    fs::write(layout.join("blobs/sha256").join(&digest), &bytes)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}
