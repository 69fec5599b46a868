//! `skimmer containerd`: what containerd has to be told to use our snapshots.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use skimmer_config::Config;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

use crate::{Global, output};

/// The snapshotter's name in containerd.
const NAME: &str = "skimmer";

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Print what belongs into containerd's configuration, or put it there.
    Config {
        /// The version that the configuration names [default: that of the file to patch, else 2]. Version 2 is of
        /// containerd 1.3 and later, version 3 of containerd 2.0 and later.
        #[arg(long, value_parser = ["2", "3"])]
        version: Option<String>,
        /// Put it into this file (usually /etc/containerd/config.toml), and keep the old one beside it. containerd
        /// has to be restarted then.
        #[arg(long, value_name = "FILE")]
        patch: Option<PathBuf>,
        /// Configuration of skimmerd [default: /etc/skimmer/config.toml when it exists].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Name the snapshotter without making it the one that pods and `ctr` use by default.
        #[arg(long)]
        not_default: bool,
    },
}

/// What became of a file.
#[derive(Serialize)]
struct Patched<'p> {
    file: &'p Path,
    version: i64,
    changed: bool,
    /// Where the old content is.
    backup: Option<PathBuf>,
}

pub(crate) fn run(options: &Options, global: &Global) -> Result<()> {
    let Action::Config { version, patch, config, not_default } = &options.action;
    let config = Config::load(config.as_deref())?;
    ensure!(config.containerd.enable, "`containerd.enable` is false in the configuration of skimmerd");
    let version = version.as_deref().map(str::parse::<i64>).transpose()?;
    match patch {
        None => {
            let version = version.unwrap_or(2);
            let mut document = DocumentMut::new();
            document["version"] = value(version);
            apply(&mut document, version, &config, !not_default)?;
            output::line(document.to_string().trim_end())
        }
        Some(file) => {
            let patched = patch_file(file, version, &config, !not_default)?;
            if global.json {
                return output::json(&patched);
            }
            if global.quiet {
                return Ok(());
            }
            let file = file.display();
            match &patched.backup {
                _ if !patched.changed => output::line(&format!("{file}: nothing to change")),
                None => output::line(&format!("{file}: written; restart containerd")),
                Some(backup) => output::line(&format!(
                    "{file}: changed, the old one is {}; restart containerd",
                    backup.display()
                )),
            }
        }
    }
}

/// Sets what containerd needs, and leaves the rest as it is.
fn apply(document: &mut DocumentMut, version: i64, config: &Config, by_default: bool) -> Result<()> {
    let root = config.root.join("snapshots");
    let plugin = table(document, &["proxy_plugins", NAME])?;
    plugin["type"] = value("snapshot");
    plugin["address"] = value(config.containerd_socket().display().to_string());
    plugin["capabilities"] = value(toml_edit::Array::from_iter(["remap-ids"]));
    let exports = table(document, &["proxy_plugins", NAME, "exports"])?;
    exports["root"] = value(root.display().to_string());
    exports["enable_remote_snapshot_annotations"] = value("true");
    let images: &[&str] = if version == 2 {
        &["plugins", "io.containerd.grpc.v1.cri", "containerd"]
    } else {
        &["plugins", "io.containerd.cri.v1.images"]
    };
    let images = table(document, images)?;
    if by_default {
        images["snapshotter"] = value(NAME);
    }
    images["disable_snapshot_annotations"] = value(false);
    images["discard_unpacked_layers"] = value(false);
    if version >= 3 {
        // The transfer service unpacks for those that it lists only.
        let transfer = table(document, &["plugins", "io.containerd.transfer.v1.local"])?;
        let listed = transfer.entry("unpack_config").or_insert_with(|| {
            let mut listed = ArrayOfTables::new();
            listed.push(unpack("overlayfs"));
            Item::ArrayOfTables(listed)
        });
        let listed = listed.as_array_of_tables_mut().context("`unpack_config` is not a list of tables")?;
        let ours = |table: &Table| table.get("snapshotter").and_then(Item::as_str) == Some(NAME);
        if !listed.iter().any(ours) {
            listed.push(unpack(NAME));
        }
    }
    Ok(())
}

/// What is unpacked for a snapshotter; containerd wants the platform of this machine.
fn unpack(snapshotter: &str) -> Table {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut table = Table::new();
    table["platform"] = value(format!("linux/{architecture}"));
    table["snapshotter"] = value(snapshotter);
    table
}

/// Whether a file of containerd's has all that it needs, apart from what it uses by default.
pub(crate) fn is_wired(file: &Path, config: &Config) -> Result<bool> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut document: DocumentMut = text.parse().with_context(|| file.display().to_string())?;
    let Some(version) = document.get("version").and_then(Item::as_integer).filter(|version| *version >= 2)
    else {
        return Ok(false);
    };
    apply(&mut document, version, config, false)?;
    Ok(document.to_string() == text)
}

/// The table of that path, made where it is missing.
fn table<'d>(document: &'d mut DocumentMut, path: &[&str]) -> Result<&'d mut Table> {
    let mut table = document.as_table_mut();
    for name in path {
        let missing = !table.contains_key(name);
        let item = table.entry(name).or_insert_with(|| Item::Table(Table::new()));
        table = item.as_table_mut().with_context(|| format!("`{}` is not a table", path.join(".")))?;
        // No header for a table that only has tables.
        if missing && Some(name) != path.last() {
            table.set_implicit(true);
        }
    }
    Ok(table)
}

fn patch_file<'p>(
    file: &'p Path,
    version: Option<i64>,
    config: &Config,
    by_default: bool,
) -> Result<Patched<'p>> {
    let old = match std::fs::read_to_string(file) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let text = old.as_deref().unwrap_or_default();
    let mut document: DocumentMut = text.parse().with_context(|| file.display().to_string())?;
    let named = document.get("version").and_then(Item::as_integer);
    let version = match (named, version) {
        (Some(named), Some(wanted)) if named != wanted => {
            bail!("{}: it has version {named}, not {wanted}", file.display())
        }
        (Some(named @ 2..=4), _) => named,
        (Some(named), _) => {
            bail!("{}: version {named} of containerd's configuration is not known", file.display())
        }
        (None, wanted) => {
            ensure!(
                document.is_empty(),
                "{}: it names no version, so it has version 1; make it one of version 2 or 3 with \
                 `containerd config migrate`",
                file.display()
            );
            let version = wanted.unwrap_or(2);
            document["version"] = value(version);
            version
        }
    };
    apply(&mut document, version, config, by_default)
        .with_context(|| format!("cannot patch {}", file.display()))?;
    let new = document.to_string();
    let changed = old.as_deref() != Some(new.as_str());
    let backup = match &old {
        Some(old) if changed => Some(keep(file, old)?),
        _ => None,
    };
    if changed {
        replace(file, &new).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(Patched { file, version, changed, backup })
}

/// Writes the old content beside the file, under the first name that is free.
fn keep(file: &Path, old: &str) -> Result<PathBuf> {
    for number in 0..1000 {
        let mut name = file.as_os_str().to_owned();
        name.push(".before-skimmer");
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let path = PathBuf::from(name);
        match std::fs::File::create_new(&path) {
            Ok(mut backup) => {
                backup.write_all(old.as_bytes()).and_then(|()| backup.sync_all())?;
                std::fs::set_permissions(&path, std::fs::metadata(file)?.permissions())?;
                return Ok(path);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
        }
    }
    bail!("{}: there are a thousand backups of it already", file.display())
}

/// Replaces the file in one step; a symbolic link stays one.
fn replace(file: &Path, text: &str) -> Result<()> {
    let real = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let dir = real.parent().context("it has no directory")?;
    let mut new = tempfile::NamedTempFile::new_in(dir)?;
    new.write_all(text.as_bytes())?;
    let mode = match std::fs::metadata(&real) {
        Ok(metadata) => metadata.permissions(),
        Err(_) => std::os::unix::fs::PermissionsExt::from_mode(0o644),
    };
    new.as_file().set_permissions(mode)?;
    new.as_file().sync_all()?;
    new.persist(&real)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;

    #[test]
    fn what_others_set_stays_and_a_second_time_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let before = "version = 2 # mine\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"x/pause:1\"\n\
                      [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"overlayfs\"\n";
        std::fs::write(&file, before).unwrap();
        let first = patch_file(&file, None, &Config::default(), true).unwrap();
        assert!(first.changed);
        assert_eq!(std::fs::read_to_string(first.backup.unwrap()).unwrap(), before);
        let after = std::fs::read_to_string(&file).unwrap();
        for part in
            ["version = 2 # mine", "sandbox_image = \"x/pause:1\"", "snapshotter = \"skimmer\"", "remap-ids"]
        {
            assert!(after.contains(part), "{part}:\n{after}");
        }
        assert!(!after.contains("overlayfs"), "{after}");
        let second = patch_file(&file, Some(2), &Config::default(), true).unwrap();
        assert!(!second.changed && second.backup.is_none());
        let error = patch_file(&file, Some(3), &Config::default(), true).err().unwrap().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    #[test]
    fn a_new_file_is_whole_and_an_old_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let made = patch_file(&file, Some(3), &Config::default(), true).unwrap();
        assert!(made.changed && made.backup.is_none());
        let text = std::fs::read_to_string(&file).unwrap();
        let parsed: DocumentMut = text.parse().unwrap();
        let listed = &parsed["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"];
        assert_eq!(listed.as_array_of_tables().unwrap().len(), 2, "{text}");
        std::fs::write(&file, "root = \"/x\"\n").unwrap();
        let error = patch_file(&file, None, &Config::default(), true).err().unwrap().to_string();
        assert!(error.contains("migrate"), "{error}");
        std::fs::write(&file, "version = 3\nproxy_plugins = 7\n").unwrap();
        let error = format!("{:#}", patch_file(&file, None, &Config::default(), true).err().unwrap());
        assert!(error.contains("proxy_plugins"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was changed");
    }
}
