//! Programs of the Go registry that the tests run as real counterparts. `cargo xtask test` installs them.

use std::path::{Path, PathBuf};

/// A program by its module and version.
#[derive(Clone, Copy, Debug)]
pub struct GoTool {
    /// The package to install.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
}

/// An S3 server over a directory.
pub const VERSITYGW: GoTool =
    GoTool { package: "github.com/versity/versitygw/cmd/versitygw", version: "v1.8.0" };

/// The current containerd, with its client and what stands between it and a container.
pub const CONTAINERD: GoTool = containerd("github.com/containerd/containerd/v2/cmd/containerd");
/// `ctr`.
pub const CTR: GoTool = containerd("github.com/containerd/containerd/v2/cmd/ctr");
/// The shim.
pub const SHIM: GoTool = containerd("github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2");

/// All of them.
pub const ALL: [GoTool; 4] = [VERSITYGW, CONTAINERD, CTR, SHIM];

const fn containerd(package: &'static str) -> GoTool {
    GoTool { package, version: "v2.4.2" }
}

impl GoTool {
    /// The program's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.package.rsplit('/').next().unwrap_or(self.package)
    }

    /// Where it is kept: `$XDG_CACHE_HOME/skimmer/tools/NAME@VERSION/NAME`. `None` when there is no such place.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let base = match (variable("XDG_CACHE_HOME"), variable("HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => Path::new(&home).join(".cache"),
            (None, None) => return None,
        };
        Some(base.join(format!("skimmer/tools/{}@{}", self.name(), self.version)).join(self.name()))
    }

    /// The program, if it is installed; else the running test counts as skipped.
    #[track_caller]
    #[must_use]
    pub fn installed(&self) -> Option<PathBuf> {
        let path = self.path().filter(|path| path.is_file());
        if path.is_none() {
            crate::skip_this(&format!("{} is missing (cargo xtask test installs it with go)", self.name()));
        }
        path
    }
}
