//! Programs of the Go and Rust registries that the tests run as real counterparts. `cargo xtask test` installs most of
//! them, `cargo xtask dragonfly` and `cargo xtask deny` those that take long to build.

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

/// What signs images.
pub const COSIGN: GoTool = GoTool { package: "github.com/sigstore/cosign/v3/cmd/cosign", version: "v3.1.3" };

/// The current containerd, with its client and what stands between it and a container.
pub const CONTAINERD: GoTool = containerd("github.com/containerd/containerd/v2/cmd/containerd");
/// `ctr`.
pub const CTR: GoTool = containerd("github.com/containerd/containerd/v2/cmd/ctr");
/// The shim.
pub const SHIM: GoTool = containerd("github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2");

/// The module of [`SCHEDULER`].
pub const DRAGONFLY: &str = "d7y.io/dragonfly/v2";
/// Dragonfly's scheduler.
pub const SCHEDULER: GoTool = GoTool { package: "d7y.io/dragonfly/v2/cmd/scheduler", version: "v2.5.1" };

/// Those that every run of the tests wants.
pub const ALL: [GoTool; 5] = [VERSITYGW, COSIGN, CONTAINERD, CTR, SHIM];

const fn containerd(package: &'static str) -> GoTool {
    GoTool { package, version: "v2.4.2" }
}

/// A program of a crate of the Rust registry.
#[derive(Clone, Copy, Debug)]
pub struct CargoTool {
    /// The crate.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The program.
    pub name: &'static str,
}

/// Dragonfly's daemon of a node.
pub const DFDAEMON: CargoTool =
    CargoTool { package: "dragonfly-client", version: "1.5.10", name: "dfdaemon" };

/// What checks licences, sources and advisories of the crates that we use.
pub const DENY: CargoTool = CargoTool { package: "cargo-deny", version: "0.20.2", name: "cargo-deny" };

impl CargoTool {
    /// Where it is kept, as [`GoTool::path`].
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        path(self.name, self.version)
    }
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
        path(self.name(), self.version)
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

fn path(name: &str, version: &str) -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = match (variable("XDG_CACHE_HOME"), variable("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => Path::new(&home).join(".cache"),
        (None, None) => return None,
    };
    Some(base.join(format!("skimmer/tools/{name}@{version}")).join(name))
}
