//! An image's tree in more layers than it has, for a kernel that gets a device slot for each.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use kernel_tests::debian_image::TAG;
use kernel_tests::fixture::{Compression, Layout};

/// Bytes of files that a layer holds before the next one begins.
const LAYER: u64 = 8 << 20;

/// Writes the tree at `root` as an image whose layers follow each other in the tree's order.
pub(super) fn split(root: &Path, into: &Path) -> Result<()> {
    let mut layers = Layers { first: Vec::new(), all: vec![Vec::new()], filled: 0 };
    layers.directory(root, Path::new("."))?;
    let tars = [&layers.first]
        .into_iter()
        .chain(&layers.all)
        .map(|names| tar(root, names))
        .collect::<Result<Vec<_>>>()?;
    let tars: Vec<_> = tars.iter().map(|tar| (tar.as_slice(), Compression::None)).collect();
    Layout::create(into)?.image(TAG, &tars)
}

struct Layers {
    /// Directories, and files with several names: a link cannot lead out of a tar.
    first: Vec<PathBuf>,
    /// Other names of each.
    all: Vec<Vec<PathBuf>>,
    filled: u64,
}

impl Layers {
    fn directory(&mut self, root: &Path, relative: &Path) -> Result<()> {
        self.first.push(relative.to_owned());
        let path = root.join(relative);
        let entries = fs::read_dir(&path).with_context(|| path.display().to_string())?;
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<OsString>>>()?;
        names.sort();
        for name in names {
            let relative = relative.join(name);
            let meta = root.join(&relative).symlink_metadata()?;
            if meta.is_dir() {
                self.directory(root, &relative)?;
            } else if meta.nlink() > 1 {
                self.first.push(relative);
            } else {
                if self.filled >= LAYER {
                    self.all.push(Vec::new());
                    self.filled = 0;
                }
                self.filled += if meta.is_file() { meta.len() } else { 0 };
                self.all.last_mut().context("no layer")?.push(relative);
            }
        }
        Ok(())
    }
}

/// Those names of `root`, and no others, as a tar.
fn tar(root: &Path, names: &[PathBuf]) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.args(["--no-recursion", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--format=posix"]);
    tar.arg("-C").arg(root).args(["--null", "-T", "-", "-cf", "-"]);
    let mut child = tar.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("tar has no input")?;
    let list: Vec<u8> = names.iter().flat_map(|name| [name.as_os_str().as_bytes(), b"\0"].concat()).collect();
    let output = std::thread::scope(|scope| {
        // It may write before it has read all names.
        scope.spawn(move || input.write_all(&list));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "tar: {}", output.status);
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use kernel_tests::fixture::unpack;

    use super::*;
    use crate::probe::sum;

    #[test]
    fn the_layers_of_a_tree_make_the_same_tree() {
        skimmer_vm_images::apt::ensure(&["umoci"]).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        fs::create_dir_all(tree.join("deep/er")).unwrap();
        for (name, mib) in [("a", 5), ("deep/b", 5), ("deep/er/c", 7), ("z", 1)] {
            fs::write(tree.join(name), vec![b'x'; mib << 20]).unwrap();
        }
        fs::hard_link(tree.join("deep/er/c"), tree.join("0")).unwrap();
        std::os::unix::fs::symlink("a", tree.join("link")).unwrap();
        let layout = scratch.path().join("layout");
        split(&tree, &layout).unwrap();
        let root = unpack(&layout, TAG, &scratch.path().join("unpacked")).unwrap();
        assert_eq!(sum(&root, &[]).unwrap().digest, sum(&tree, &[]).unwrap().digest);
        let ino = |name: &str| root.join(name).metadata().unwrap().ino();
        assert_eq!(ino("0"), ino("deep/er/c"));
        // Links and directories, a and b, the rest.
        let layers = fs::read_dir(layout.join("blobs/sha256")).unwrap().count() - 2;
        assert_eq!(layers, 3);
    }
}
