//! ext4 disk images for guests, made with mke2fs and without mounting anything.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::run;

/// Makes an empty ext4 image of `size` bytes: sparse, writable, with a journal.
///
/// # Errors
/// The file cannot be made, or mke2fs fails.
pub fn empty(image: &Path, size: u64) -> Result<()> {
    make(image, size, |command| command)
}

/// Makes an empty ext4 image whose own tables and journal all lie in the file already: when the place of the file gets
/// full, only writes to files in it fail.
///
/// # Errors
/// As [`empty`].
pub fn solid(image: &Path, size: u64) -> Result<()> {
    make(image, size, |command| {
        let written = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
        command.args(["-N", "1024", "-J", "size=4", "-m", "0", "-E", written])
    })
}

/// Makes an ext4 image with the content of `directory`: names, owners, modes, times, xattrs and special files.
///
/// # Errors
/// The directory cannot be read, or mke2fs fails.
pub fn from_directory(image: &Path, directory: &Path) -> Result<()> {
    let (bytes, files) = usage(directory)?;
    // A third above for the file system's own tables; inodes of 256 bytes.
    let size = bytes + bytes / 3 + files * 512 + (16 << 20);
    make(image, size, |command| {
        command.args(["-O", "^has_journal", "-m", "0", "-N", &(files + 64).to_string(), "-d"]).arg(directory)
    })
    .with_context(|| format!("cannot pack {} into a disk image", directory.display()))
}

/// Makes an ext4 image of `size` bytes that holds the content of `directory` and is to be written: with a journal.
///
/// # Errors
/// As [`from_directory`], and when `size` is too small.
pub fn system(image: &Path, directory: &Path, size: u64) -> Result<()> {
    make(image, size, |command| command.arg("-d").arg(directory))
        .with_context(|| format!("cannot pack {} into a disk image", directory.display()))
}

fn make(image: &Path, size: u64, options: impl FnOnce(&mut Command) -> &mut Command) -> Result<()> {
    let size = size.next_multiple_of(1 << 20);
    let file =
        File::create(image).with_context(|| format!("cannot make the disk image {}", image.display()))?;
    file.set_len(size)?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-E", "nodiscard,lazy_itable_init=1"]);
    options(&mut command);
    run(command.arg(image)).map(drop)
}

/// (bytes rounded up to blocks, number of inodes) below `directory`.
fn usage(directory: &Path) -> Result<(u64, u64)> {
    let (mut bytes, mut files) = (0, 1);
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in
            fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?
        {
            let entry = entry?;
            let metadata = entry.metadata()?;
            bytes += metadata.size().next_multiple_of(4096) + 4096;
            files += 1;
            if metadata.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok((bytes, files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_the_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        fs::create_dir_all(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/file"), vec![7; 300_000]).unwrap();
        for index in 0..200 {
            fs::write(tree.join(format!("small-{index}")), b"x").unwrap();
        }
        let image = scratch.path().join("image");
        from_directory(&image, &tree).unwrap();
        run(Command::new("e2fsck").args(["-fn"]).arg(&image)).unwrap();
        let content = run(Command::new("debugfs").args(["-R", "cat /sub/file"]).arg(&image)).unwrap();
        assert_eq!(content, vec![7; 300_000]);
    }

    #[test]
    fn an_empty_image_has_its_size() {
        let scratch = tempfile::tempdir().unwrap();
        let image = scratch.path().join("image");
        empty(&image, 64 << 20).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), 64 << 20);
        run(Command::new("e2fsck").args(["-fn"]).arg(&image)).unwrap();
    }
}
