//! Contenders of the kernel's own and of libfuse.

use anyhow::Result;

use super::{Outcome, SHORT, Stage, Undo};

impl<'a> Stage<'a> {
    pub(super) fn erofs_loop(&self, name: &str) -> Result<Outcome<'a>> {
        let point = self.mount_point(name)?;
        // The kernel frees the loop device with the mount.
        self.machine.check(&["mount", "-t", "erofs", "-o", "ro,loop", &self.flat, &point], SHORT)?;
        let undo = Undo { machine: self.machine, line: format!("umount '{point}'") };
        Ok(self.mounted(name, point, None, vec![undo]))
    }

    pub(super) fn erofs_file(&self, name: &str) -> Result<Outcome<'a>> {
        let point = self.mount_point(name)?;
        let probe = format!("{}/skimmer-probe", self.programs);
        let output = self.machine.run(&[&probe, "mount", "-t", "erofs", &self.flat, &point], SHORT)?;
        if !output.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            let why = why.lines().find(|line| line.contains("os error")).unwrap_or("refused").trim();
            return Ok(Outcome::Skipped(format!("this kernel does not mount EROFS from a file: {why}")));
        }
        let undo = Undo { machine: self.machine, line: format!("umount '{point}'") };
        Ok(self.mounted(name, point, None, vec![undo]))
    }

    pub(super) fn fuse(&self, name: &str) -> Result<Outcome<'a>> {
        if !self.machine.run(&["test", "-c", "/dev/fuse"], SHORT)?.success() {
            return Ok(Outcome::Skipped("this kernel has no FUSE".to_owned()));
        }
        let point = self.mount_point(name)?;
        // It keeps a descriptor for every file it has shown, and goes to the background when the mount stands.
        let line =
            format!("ulimit -n 1048576; '{}' -o 'source={},cache=always' '{point}'", self.fuse, self.tree);
        self.machine.check(&["sh", "-c", &line], SHORT)?;
        let undo = Undo { machine: self.machine, line: format!("umount '{point}'") };
        Ok(self.mounted(name, point, None, vec![undo]))
    }
}
