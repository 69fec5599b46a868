//! Making a kernel ready: packages resolved, fetched and unpacked, modules rebuilt, all kept by content key.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::apt::{self, Archive};
use crate::cache::{self, Entry, Key};
use crate::process::run;
use crate::recipe::{AttachMode, Recipe, recipe};

/// Part of every key: raise it when the same recipe must give another result.
const BUILDER: &str = "1";
/// Taken from this machine's own release for every guest.
const BUSYBOX: &str = "busybox-static";

/// A kernel on disk, ready to boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its name in `kernels.toml`.
    pub name: String,
    /// `uname -r`.
    pub release: String,
    /// The Debian version of its packages.
    pub version: String,
    /// The content key: recipe and package versions.
    pub key: String,
    /// The kernel image.
    pub vmlinuz: PathBuf,
    /// The modules in insmod order, uncompressed.
    pub modules: Vec<PathBuf>,
    /// A static busybox for the guest root.
    pub busybox: PathBuf,
    /// What the guest can do.
    pub attach: Vec<AttachMode>,
}

/// What the archive holds for a recipe; written down so that later runs ask nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Resolution {
    release: String,
    version: String,
    /// (name, version), sorted.
    packages: Vec<(String, String)>,
}

/// What a finished directory says about itself.
#[derive(Serialize, Deserialize)]
struct Manifest {
    release: String,
    version: String,
    modules: Vec<String>,
}

/// Makes the kernel `name` of `kernels.toml` ready, from the cache when it is there.
///
/// The first run resolves package versions from the archive and remembers them; `SKIMMER_VM_REFRESH=1` in the
/// environment resolves anew.
///
/// # Errors
/// An unknown name, packages that the archive does not have, a failed download or build; not being root where
/// build tools have to be installed.
pub fn prepare(name: &str) -> Result<Kernel> {
    let recipe = recipe(name)?;
    let resolution = pinned(&recipe).with_context(|| format!("cannot find the packages of kernel {name}"))?;
    let mut key = Key::new("kernel");
    key.add(BUILDER.as_bytes());
    key.add(&serde_json::to_vec(&recipe)?);
    key.add(&serde_json::to_vec(&resolution)?);
    let key = key.finish();
    let directory = Entry::new("kernels", &key)?
        .get_or_make(|aside| build(&recipe, &resolution, aside))
        .with_context(|| format!("cannot prepare kernel {name}"))?;
    let manifest: Manifest = serde_json::from_slice(&fs::read(directory.join("kernel.json"))?)?;
    Ok(Kernel {
        name: recipe.name,
        release: manifest.release,
        version: manifest.version,
        key,
        vmlinuz: directory.join("vmlinuz"),
        modules: manifest.modules.iter().map(|module| directory.join("modules").join(module)).collect(),
        busybox: directory.join("busybox"),
        attach: recipe.attach,
    })
}

/// The resolution remembered for this recipe, or a new one.
fn pinned(recipe: &Recipe) -> Result<Resolution> {
    let mut key = Key::new("pin");
    key.add(&serde_json::to_vec(recipe)?);
    let pins = cache::root()?.join("pins");
    fs::create_dir_all(&pins)?;
    let path = pins.join(format!("{}-{}.json", recipe.name, key.finish()));
    let refresh = std::env::var_os("SKIMMER_VM_REFRESH").is_some_and(|value| value == "1");
    if !refresh && let Ok(text) = fs::read(&path) {
        return serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged: delete it and try again", path.display()));
    }
    let _lock = cache::lock(&path.with_extension("lock"))?;
    let archive = Archive::open(recipe.archive.as_deref())?;
    let resolution = match resolve(recipe, &archive) {
        Ok(resolution) if !refresh => resolution,
        // Old lists or none at all.
        _ => {
            archive.update()?;
            resolve(recipe, &archive)?
        }
    };
    let mut file = tempfile::NamedTempFile::new_in(&pins)?;
    file.write_all(&serde_json::to_vec_pretty(&resolution)?)?;
    file.persist(&path)?;
    Ok(resolution)
}

/// Finds the newest kernel package for which everything else is there in the same version.
fn resolve(recipe: &Recipe, archive: &Archive) -> Result<Resolution> {
    let mut candidates = Vec::new();
    for package in archive.names(&recipe.image_prefix())? {
        if let Some(release) = recipe.release_of(&package)
            && let Some(version) = archive.versions(&package)?.into_iter().next()
        {
            candidates.push((version, release.to_owned(), package));
        }
    }
    candidates.sort_by(|a, b| {
        if apt::newer(&a.0, &b.0) { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater }
    });
    for (version, release, image) in candidates {
        let mut packages = vec![(image, version.clone())];
        let fixed = [&recipe.module_package, &recipe.headers, &recipe.source];
        for pattern in fixed.into_iter().flatten() {
            packages.push((pattern.replace("{release}", &release), version.clone()));
        }
        if !packages[1..].iter().all(|(package, version)| has_version(archive, package, version)) {
            continue;
        }
        if let Some(headers) = &recipe.headers {
            for package in archive.depends(&headers.replace("{release}", &release), &version)? {
                if !["linux-headers-", "linux-kbuild-"].iter().any(|prefix| package.starts_with(prefix)) {
                    continue;
                }
                let same = has_version(archive, &package, &version).then(|| version.clone());
                let newest = || archive.versions(&package).ok()?.into_iter().next();
                let version = same.or_else(newest).with_context(|| format!("no package {package}"))?;
                packages.push((package, version));
            }
        }
        let busybox = Archive::open(None)?
            .versions(BUSYBOX)?
            .into_iter()
            .next()
            .context("no package busybox-static")?;
        packages.push((BUSYBOX.to_owned(), busybox));
        packages.sort();
        return Ok(Resolution { release, version, packages });
    }
    bail!(
        "no package {} with release {}*{} and matching headers and source: add Debian's {} to the apt sources",
        recipe.image,
        recipe.release_prefix,
        recipe.release_suffix,
        recipe.suites.join(" and ")
    )
}

fn has_version(archive: &Archive, package: &str, version: &str) -> bool {
    archive.versions(package).is_ok_and(|versions| versions.iter().any(|have| have == version))
}

fn build(recipe: &Recipe, resolution: &Resolution, into: &Path) -> Result<()> {
    eprintln!("preparing kernel {} ({}): once, about a minute", resolution.release, resolution.version);
    if !recipe.rebuild.is_empty() {
        // libelf1 and libssl3 are what the packaged build helpers link to.
        apt::ensure(&["gcc-12", "make", "binutils", "xz-utils", "libelf1", "libssl3"])?;
    }
    let scratch = tempfile::Builder::new().prefix(".scratch-").tempdir_in(cache::root()?)?;
    let debs = scratch.path().join("debs");
    let tree = scratch.path().join("tree");
    fs::create_dir(&debs)?;
    fs::create_dir(&tree)?;
    let (own, archive) = (Archive::open(None)?, Archive::open(recipe.archive.as_deref())?);
    let mut source = None;
    for (package, version) in &resolution.packages {
        let archive = if package == BUSYBOX { &own } else { &archive };
        let deb = archive.download(package, version, &debs).or_else(|first| {
            // Lists that were deleted, or that no longer lead to the package.
            archive.update().with_context(|| format!("after {first:#}"))?;
            archive.download(package, version, &debs)
        })?;
        if Some(package) == recipe.source.as_ref() {
            source = Some(deb);
        } else {
            apt::unpack(&deb, &tree)?;
        }
    }

    let modules = into.join("modules");
    fs::create_dir(&modules)?;
    let mut rebuilt = Vec::new();
    if let (Some(source), Some(headers)) = (&source, &recipe.headers) {
        let headers = headers.replace("{release}", &resolution.release);
        rebuilt = rebuild(recipe, source, &tree, &headers, scratch.path())?;
    }
    let packaged = find_modules(&merged(&tree, "lib/modules").join(&resolution.release))?;
    let mut names = Vec::new();
    for (index, module) in recipe.modules.iter().enumerate() {
        let name = format!("{index:02}-{module}.ko");
        let target = modules.join(&name);
        if let Some((_, path)) = rebuilt.iter().find(|(rebuilt, _)| rebuilt == module) {
            run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&target).arg(path))?;
        } else if let Some((_, path)) = packaged.iter().find(|(name, _)| name == module) {
            copy_uncompressed(path, &target)?;
        } else {
            bail!(
                "kernel {} has no module {module}: take it off the list in kernels.toml",
                resolution.release
            );
        }
        names.push(name);
    }
    let boot = tree.join("boot").join(format!("vmlinuz-{}", resolution.release));
    // Where packages since 7.2 put it.
    let beside = merged(&tree, "lib/modules").join(&resolution.release).join("vmlinuz.unsigned");
    let vmlinuz = if boot.exists() { boot } else { beside };
    fs::copy(&vmlinuz, into.join("vmlinuz")).with_context(|| format!("{}", vmlinuz.display()))?;
    fs::copy(merged(&tree, "bin/busybox"), into.join("busybox"))
        .context("busybox-static holds no bin/busybox")?;
    let (release, version) = (resolution.release.clone(), resolution.version.clone());
    fs::write(
        into.join("kernel.json"),
        serde_json::to_vec_pretty(&Manifest { release, version, modules: names })?,
    )?;
    Ok(())
}

/// `path` of an unpacked tree, below `usr` where newer packages put it.
fn merged(tree: &Path, path: &str) -> PathBuf {
    let old = tree.join(path);
    if old.exists() { old } else { tree.join("usr").join(path) }
}

/// Builds the recipe's modules outside the kernel tree; gives (name, path).
fn rebuild(
    recipe: &Recipe,
    source: &Path,
    tree: &Path,
    headers: &str,
    scratch: &Path,
) -> Result<Vec<(String, PathBuf)>> {
    let sources = scratch.join("source");
    fs::create_dir(&sources)?;
    unpack_sources(recipe, source, &sources)?;

    // The flavour's Makefile includes the common one by an absolute path.
    let headers = tree.join("usr/src").join(headers);
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile).with_context(|| format!("{}", makefile.display()))?;
    let here = format!("include {}/usr/src/", tree.display());
    fs::write(&makefile, text.replace("include /usr/src/", &here))?;

    let mut built = Vec::new();
    for rebuild in &recipe.rebuild {
        let directory = sources.join(&rebuild.directory);
        let defines: Vec<String> = rebuild
            .options
            .iter()
            .filter_map(|option| option.strip_suffix("=y"))
            .map(|option| format!("-D{option}=1"))
            .collect();
        run(Command::new("make")
            .arg("-C")
            .arg(&headers)
            .arg(format!("M={}", directory.display()))
            .arg("-j2")
            .args(&rebuild.options)
            .args(&recipe.make)
            .arg(format!("KCFLAGS={}", defines.join(" ")))
            .arg("modules"))?;
        let module = directory.join(format!("{}.ko", rebuild.module));
        if !module.is_file() {
            bail!("the build of {} left no {}", rebuild.directory, module.display());
        }
        built.push((rebuild.module.clone(), module));
    }
    Ok(built)
}

/// Unpacks the wanted directories of the source package: deb, then tarball, without writing either out.
fn unpack_sources(recipe: &Recipe, package: &Path, into: &Path) -> Result<()> {
    let name = recipe.source.as_deref().context("a recipe that rebuilds names its source")?;
    let mut deb =
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let mut tarball = Command::new("tar")
        .args(["-xO", &format!("./usr/src/{name}.tar.xz")])
        .stdin(deb.stdout.take().context("piped above")?)
        .stdout(Stdio::piped())
        .spawn()?;
    let wanted = recipe.rebuild.iter().map(|rebuild| format!("{name}/{}", rebuild.directory));
    let unpacked = Command::new("tar")
        .arg("-xJ")
        .arg("-C")
        .arg(into)
        .arg("--strip-components=1")
        .args(wanted)
        .stdin(tarball.stdout.take().context("piped above")?)
        .status()?;
    let ends = [deb.wait()?, tarball.wait()?, unpacked];
    if ends.iter().any(|end| !end.success()) {
        bail!("cannot unpack {}: {ends:?}", package.display());
    }
    Ok(())
}

/// All packaged modules under `directory`, by name.
fn find_modules(directory: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    let mut todo = vec![directory.join("kernel")];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            } else if let Some((stem, "" | ".xz")) = name.split_once(".ko") {
                found.push((stem.replace('-', "_"), entry.path()));
            }
        }
    }
    Ok(found)
}

fn copy_uncompressed(from: &Path, to: &Path) -> Result<()> {
    if from.extension().is_some_and(|extension| extension == "xz") {
        let status = Command::new("xz").arg("-dc").arg(from).stdout(File::create(to)?).status()?;
        if !status.success() {
            bail!("cannot unpack {}: xz ended with {status}", from.display());
        }
    } else {
        fs::copy(from, to)?;
    }
    Ok(())
}
