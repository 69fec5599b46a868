//! The kubelet's credential provider plugins.
//!
//! Source: Kubernetes, `kubelet.config.k8s.io` CredentialProviderConfig and `credentialprovider.kubelet.k8s.io`
//! CredentialProviderRequest and -Response; matching as its documentation of `matchImages` states.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{Credential, Secret, exchange, read_file};

/// Where the plugins are, and what they have answered. Clones share the answers.
#[derive(Clone)]
pub(super) struct Providers {
    config: PathBuf,
    bin_dir: PathBuf,
    answers: Arc<Mutex<HashMap<String, Kept>>>,
}

/// An answer and how long it is good.
#[derive(Clone)]
struct Kept {
    until: Instant,
    auth: Vec<(String, Credential)>,
}

/// Answers that are remembered; beyond that all are forgotten.
const MOST: usize = 1024;

#[derive(Deserialize)]
struct Config {
    kind: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    #[serde(default)]
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    #[serde(default)]
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<HashMap<String, Auth>>,
}

#[derive(Deserialize)]
struct Auth {
    username: String,
    password: String,
}

impl Providers {
    pub(super) fn new(config: &Path, bin_dir: &Path) -> Self {
        Self { config: config.to_owned(), bin_dir: bin_dir.to_owned(), answers: Arc::default() }
    }

    /// Asks the plugins whose patterns match, in the order of the file, until one has something.
    pub(super) async fn find(
        &self,
        host: &str,
        repository: &str,
        fresh: bool,
        limit: Duration,
    ) -> Result<Option<Credential>, String> {
        let path = self.config.display();
        let named = |problem: String| format!("{path}: {problem}");
        let text = read_file(&self.config).await.map_err(named)?;
        let text = text.ok_or_else(|| named("no such file".to_owned()))?;
        let text = std::str::from_utf8(&text).map_err(|_| named("it is not UTF-8".to_owned()))?;
        let config: Config = serde_saphyr::from_str(text)
            .map_err(|error| named(error.to_string().lines().next().unwrap_or_default().to_owned()))?;
        if config.kind != "CredentialProviderConfig" {
            return Err(named(format!("kind `{}` is not CredentialProviderConfig", config.kind)));
        }
        let image = format!("{host}/{repository}");
        for provider in &config.providers {
            if !provider.match_images.iter().any(|pattern| matches(pattern, &image)) {
                continue;
            }
            let asked = self.ask(provider, host, &image, fresh, limit).await;
            let found = asked.map_err(|error| named(format!("provider `{}`: {error}", provider.name)))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    async fn ask(
        &self,
        provider: &Provider,
        host: &str,
        image: &str,
        fresh: bool,
        limit: Duration,
    ) -> Result<Option<Credential>, String> {
        let keys = [("Image", image), ("Registry", host), ("Global", "")];
        let key = |kind: &str, what: &str| format!("{}\n{kind}\n{what}", provider.name);
        if !fresh {
            let now = Instant::now();
            let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = keys.iter().find_map(|(kind, what)| answers.get(&key(kind, what)));
            if let Some(kept) = kept.filter(|kept| kept.until > now) {
                return Ok(choose(&kept.auth, image));
            }
        }
        if provider.name.is_empty() || provider.name.contains(['/', ' ']) || provider.name.starts_with('.') {
            return Err("the name must be that of a file in the plugin directory".to_owned());
        }
        let mut command = tokio::process::Command::new(self.bin_dir.join(&provider.name));
        command.args(provider.args.iter().flatten());
        command.envs(provider.env.iter().flatten().map(|variable| (&variable.name, &variable.value)));
        let request = serde_json::json!({
            "apiVersion": provider.api_version, "kind": "CredentialProviderRequest", "image": image,
        });
        let (status, output) = tokio::time::timeout(limit, exchange(command, request.to_string().as_bytes()))
            .await
            .map_err(|_| format!("it gave no answer in {} s", limit.as_secs_f32()))??;
        if !status.success() {
            return Err(format!("it failed with {status}"));
        }
        // The output may hold a secret, so an error does not quote it.
        let response: Response = serde_json::from_slice(&output)
            .map_err(|_| "it printed something else than a CredentialProviderResponse".to_owned())?;
        if response.kind != "CredentialProviderResponse" {
            return Err("it printed something else than a CredentialProviderResponse".to_owned());
        }
        let credential =
            |auth: Auth| Credential::Password { user: auth.username, password: Secret(auth.password) };
        let mut auth: Vec<_> =
            response.auth.into_iter().flatten().map(|(at, auth)| (at, credential(auth))).collect();
        // The most particular pattern first, as the kubelet sorts them.
        auth.sort_by(|(a, _), (b, _)| b.cmp(a));
        let found = choose(&auth, image);
        let life = response.cache_duration.or_else(|| provider.default_cache_duration.clone());
        let life = life.as_deref().and_then(crate::duration::parse).unwrap_or_default();
        if let Some((kind, what)) = keys.iter().find(|(kind, _)| *kind == response.cache_key_type) {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            if answers.len() >= MOST {
                answers.clear();
            }
            answers.insert(key(kind, what), Kept { until: Instant::now() + life, auth });
        }
        Ok(found)
    }
}

fn choose(auth: &[(String, Credential)], image: &str) -> Option<Credential> {
    auth.iter().find(|(pattern, _)| matches(pattern, image)).map(|(_, credential)| credential.clone())
}

/// Whether `image` (`host[:port]/path`) is meant by a pattern: as many domain labels, each matched by its glob; the
/// same port when the pattern has one; a path that begins as the pattern's does.
fn matches(pattern: &str, image: &str) -> bool {
    let pattern = pattern.strip_prefix("https://").or(pattern.strip_prefix("http://")).unwrap_or(pattern);
    let split = |text: &str| -> (String, Option<String>, String) {
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        match host.rsplit_once(':') {
            Some((name, port)) => (name.to_owned(), Some(port.to_owned()), path.to_owned()),
            None => (host.to_owned(), None, path.to_owned()),
        }
    };
    let (pattern_host, pattern_port, pattern_path) = split(pattern);
    let (host, port, path) = split(image);
    let labels = |host: &str| host.split('.').map(str::to_owned).collect::<Vec<_>>();
    let (globs, labels) = (labels(&pattern_host), labels(&host));
    globs.len() == labels.len()
        && (pattern_port.is_none() || pattern_port == port)
        && globs.iter().zip(&labels).all(|(pattern, label)| glob(pattern.as_bytes(), label.as_bytes()))
        && path.starts_with(pattern_path.trim_end_matches('/'))
}

/// `*` stands for any bytes, `?` for one.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut in_text) = (0, 0);
    let mut star = None;
    while in_text < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, in_text));
                at += 1;
            }
            Some(&c) if c == b'?' || c == text[in_text] => (at, in_text) = (at + 1, in_text + 1),
            _ => match star {
                None => return false,
                Some((star_at, from)) => {
                    star = Some((star_at, from + 1));
                    (at, in_text) = (star_at + 1, from + 1);
                }
            },
        }
    }
    pattern[at..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn patterns() {
        for (pattern, image, means) in [
            ("123.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-1.amazonaws.com/a", true),
            ("*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.eu-1.amazonaws.com/a", true),
            ("*.io", "eu.gcr.io/a", false),
            ("*.*.io", "eu.gcr.io/a", true),
            ("gcr.io/team", "gcr.io/team/app", true),
            ("gcr.io/team", "gcr.io/other/app", false),
            ("h:5000", "h:5000/a", true),
            ("h:5000", "h:5001/a", false),
            ("h", "h:5001/a", true),
            ("https://h/a/", "h/a/b", true),
            ("a?c*e", "abcde", true),
            ("a*b*c", "aXbXbc", true),
            ("a*b*c", "aXbXbd", false),
            ("", "h", false),
        ] {
            assert_eq!(matches(pattern, image), means, "{pattern} {image}");
        }
    }

    #[tokio::test]
    async fn plugins_are_asked_and_their_answers_kept() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, script: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        };
        let response = |key: &str, auth: &str| {
            format!(
                r#"{{"kind":"CredentialProviderResponse","cacheKeyType":"{key}","cacheDuration":"1m0s","auth":{auth}}}"#
            )
        };
        let auth = r#"{"*.example.org":{"username":"u-$1-$VAR","password":"p"},"*.example.org/deep":{"username":"deep","password":"p"}}"#;
        let count = dir.path().join("count");
        program(
            "good",
            &format!("cat >> {}; cat <<END\n{}\nEND", count.display(), response("Registry", auth)),
        );
        program("none", &format!("echo '{}'", response("Image", "null")));
        program("junk", "echo hunter2");
        program("hangs", "exec sleep 60");
        program("fails", "exit 3");
        let config = dir.path().join("config.yaml");
        let provider = |name: &str, host: &str| {
            format!(
                "- name: {name}\n  matchImages:\n  - \"{host}\"\n  defaultCacheDuration: \"12h\"\n  \
                 apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get]\n  env:\n  - name: VAR\n    value: v\n"
            )
        };
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n{}{}{}{}{}{}{}",
            provider("none", "*.example.org"),
            provider("good", "*.example.org"),
            provider("junk", "junk.io"),
            provider("hangs", "hangs.io"),
            provider("fails", "fails.io"),
            provider("absent", "absent.io"),
            provider("../evil", "evil.io"),
        );
        std::fs::write(&config, text).unwrap();
        let providers = Providers::new(&config, dir.path());
        let find = async |host: &str, repository: &str, fresh| {
            providers.find(host, repository, fresh, Duration::from_millis(700)).await
        };
        let requests = || {
            let text = std::fs::read_to_string(&count).unwrap();
            let all = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
            all.filter(|request| {
                request.as_ref().unwrap()["image"].as_str().unwrap().contains("example.org/")
            })
            .count()
        };
        let user = |found: Result<Option<Credential>, String>| match found {
            Ok(Some(Credential::Password { user, .. })) => user,
            other => panic!("{other:?}"),
        };
        assert_eq!(user(find("a.example.org", "x", false).await), "u-get-v");
        assert_eq!(user(find("a.example.org", "deep/y", false).await), "deep");
        assert_eq!(requests(), 1);
        user(find("a.example.org", "x", true).await);
        user(find("b.example.org", "x", false).await);
        assert_eq!(requests(), 3);
        assert_eq!(find("elsewhere.org", "x", false).await, Ok(None));
        for (host, word) in [
            ("junk.io", "something else"),
            ("hangs.io", "no answer"),
            ("fails.io", "exit status: 3"),
            ("absent.io", "not installed"),
            ("evil.io", "plugin directory"),
        ] {
            let error = find(host, "x", false).await.unwrap_err();
            assert!(
                error.contains(word) && error.contains("config.yaml") && !error.contains("hunter2"),
                "{error}"
            );
        }
        for (text, word) in
            [("kind: Pod\n", "`Pod`"), ("kind: [\n", "config.yaml"), ("providers: 3\n", "line 1")]
        {
            std::fs::write(&config, text).unwrap();
            let error = find("a.example.org", "x", false).await.unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
