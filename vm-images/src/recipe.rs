//! `kernels.toml`: which kernels there are and what has to be done to them.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// How a guest kernel can ask for data on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// EROFS over fscache through `/dev/cachefiles`.
    Fscache,
    /// Pre-content events on a file-backed EROFS mount.
    Fanotify,
}

/// One module that is built anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rebuild {
    /// The module's name, without `.ko`.
    pub module: String,
    /// Its directory in the kernel source.
    pub directory: String,
    /// `CONFIG_X=m` or `CONFIG_X=y`, given to make; the `=y` ones become defines too.
    pub options: Vec<String>,
}

/// One kernel of `kernels.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The name that tests use.
    pub name: String,
    /// The Debian suites that hold its packages, for messages.
    pub suites: Vec<String>,
    /// What the release (`uname -r`) starts with.
    pub release_prefix: String,
    /// What the release ends with.
    pub release_suffix: String,
    /// The suite whose packages are taken, by package lists of our own; absent: what this machine's apt knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<String>,
    /// The kernel package, `{release}` standing for the release.
    pub image: String,
    /// The package of its modules where they have one of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module_package: Option<String>,
    /// The header package of the flavour; absent when nothing is rebuilt.
    pub headers: Option<String>,
    /// The source package; absent when nothing is rebuilt.
    pub source: Option<String>,
    /// The attach modes that the guest supports.
    pub attach: Vec<AttachMode>,
    /// Modules in insmod order.
    pub modules: Vec<String>,
    /// Further make variables for every rebuilt module.
    pub make: Vec<String>,
    /// What is rebuilt.
    #[serde(default)]
    pub rebuild: Vec<Rebuild>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipes {
    kernel: Vec<Recipe>,
}

/// All kernels of `kernels.toml`, in its order.
///
/// # Errors
/// The file does not parse, or a recipe rebuilds something without headers and source.
pub fn recipes() -> Result<Vec<Recipe>> {
    parse(include_str!("../kernels.toml"))
}

fn parse(text: &str) -> Result<Vec<Recipe>> {
    let recipes: Recipes = toml::from_str(text).context("kernels.toml")?;
    for recipe in &recipes.kernel {
        if !recipe.rebuild.is_empty() && (recipe.headers.is_none() || recipe.source.is_none()) {
            bail!("kernels.toml: kernel {} rebuilds modules but names no headers or source", recipe.name);
        }
        if let Some(stray) = recipe.rebuild.iter().find(|rebuild| !recipe.modules.contains(&rebuild.module)) {
            bail!("kernels.toml: kernel {} rebuilds {} but never loads it", recipe.name, stray.module);
        }
    }
    Ok(recipes.kernel)
}

/// The kernel called `name`.
///
/// # Errors
/// There is none: the message lists those that exist.
pub fn recipe(name: &str) -> Result<Recipe> {
    let all = recipes()?;
    let names: Vec<String> = all.iter().map(|recipe| recipe.name.clone()).collect();
    all.into_iter()
        .find(|recipe| recipe.name == name)
        .with_context(|| format!("no kernel {name} in kernels.toml; there are: {}", names.join(", ")))
}

impl Recipe {
    /// The release that an image package of this recipe carries, or nothing when the name is of another kind.
    pub(crate) fn release_of<'a>(&self, package: &'a str) -> Option<&'a str> {
        let (before, after) = self.image.split_once("{release}")?;
        let release = package.strip_prefix(before)?.strip_suffix(after)?;
        (release.starts_with(&self.release_prefix) && release.ends_with(&self.release_suffix))
            .then_some(release)
    }

    /// What all image packages of this recipe start with.
    pub(crate) fn image_prefix(&self) -> String {
        let before = self.image.split_once("{release}").map_or("", |(before, _)| before);
        format!("{before}{}", self.release_prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_parses_and_names_are_unique() {
        let all = recipes().unwrap();
        let mut names: Vec<&str> = all.iter().map(|recipe| recipe.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
        assert!(recipe("6.1").unwrap().attach.contains(&AttachMode::Fscache));
        assert!(recipe("5.4").unwrap_err().to_string().contains("6.1"));
    }

    #[test]
    fn a_release_is_taken_out_of_the_package_name() {
        let recipe = recipe("6.1").unwrap();
        let release = recipe.release_of("linux-image-6.1.0-56-cloud-amd64-unsigned");
        assert_eq!(release, Some("6.1.0-56-cloud-amd64"));
        assert_eq!(recipe.release_of("linux-image-6.1.0-56-cloud-amd64"), None);
        assert_eq!(recipe.release_of("linux-image-6.1.0-56-amd64-unsigned"), None);
        assert_eq!(recipe.image_prefix(), "linux-image-6.1.");
    }

    #[test]
    fn unknown_keys_and_stray_rebuilds_are_refused() {
        let text = include_str!("../kernels.toml");
        assert!(parse(&text.replace("release_suffix", "release_sufix")).is_err());
        let error = parse(&text.replace("module = \"erofs\"", "module = \"xfs\"")).unwrap_err();
        assert!(error.to_string().contains("never loads it"), "{error}");
    }
}
