//! Who we are to a registry: a user and password, an identity token, or nobody.
//!
//! Looked up like docker and podman do. The parser is ours and not `docker_credential`'s because a credential
//! program must not hang us (that crate waits for it without limit, on the calling thread), and because
//! podman's keys match by path prefix.

mod kubelet;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, to be sent and not to be logged.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What is shown to a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    Anonymous,
    /// User and password, for Basic and for token requests.
    Password {
        /// The user's name.
        user: String,
        /// The password.
        password: Secret,
    },
    /// An identity (refresh) token for the token endpoint.
    IdentityToken(Secret),
}

/// What a look-up found, and what stood in its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What to use.
    pub credential: Credential,
    /// Why nothing better was found: a broken file, a credential program that is missing or hangs.
    pub problem: Option<String>,
}

/// Logins that somebody else keeps, and may change at any time.
pub trait Logins: Send + Sync {
    /// The login for a repository of a host, if there is one; after the host refused what this gave before, maybe
    /// another.
    fn login(&self, host: &str, repository: &str, refused: bool) -> Option<Credential>;
}

/// Where credentials come from. Cheap to clone; clones share what credential programs answered.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

struct Inner {
    fixed: Vec<(String, Credential)>,
    logins: Option<Arc<dyn Logins>>,
    files: Vec<PathBuf>,
    helper_dir: Option<PathBuf>,
    helper_timeout: Duration,
    helped: Mutex<HashMap<String, Credential>>,
    kubelet: Option<kubelet::Providers>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<_> = self.0.fixed.iter().map(|(host, _)| host).collect();
        f.debug_struct("Credentials")
            .field("fixed", &hosts)
            .field("files", &self.0.files)
            .finish_non_exhaustive()
    }
}

impl Default for Credentials {
    fn default() -> Self {
        Self::lookup()
    }
}

/// Longest wait for a credential program.
const HELPER_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes that a credential program may print.
const HELPER_OUTPUT: u64 = 64 * 1024;
/// Largest configuration file that is read.
const MAX_FILE: u64 = 1 << 20;

impl Credentials {
    /// No credentials at all.
    pub fn anonymous() -> Self {
        Self::from_files(Vec::new())
    }

    /// The files of podman and docker, in this order: `$REGISTRY_AUTH_FILE`,
    /// `$XDG_RUNTIME_DIR/containers/auth.json`, `$XDG_CONFIG_HOME/containers/auth.json` (default
    /// `~/.config`), `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`. Read anew at each use.
    pub fn lookup() -> Self {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = variable("HOME");
        let under = |dir: Option<PathBuf>, rest: &str| dir.map(|dir| dir.join(rest));
        let config = variable("XDG_CONFIG_HOME").or_else(|| under(home.clone(), ".config"));
        let docker = variable("DOCKER_CONFIG").or_else(|| under(home, ".docker"));
        let files = [
            variable("REGISTRY_AUTH_FILE"),
            under(variable("XDG_RUNTIME_DIR"), "containers/auth.json"),
            under(config, "containers/auth.json"),
            under(docker, "config.json"),
        ];
        Self::from_files(files.into_iter().flatten().collect())
    }

    /// These files, first match wins. Absent ones are skipped.
    pub fn from_files(files: Vec<PathBuf>) -> Self {
        Self(Arc::new(Inner {
            fixed: Vec::new(),
            logins: None,
            files,
            helper_dir: None,
            helper_timeout: HELPER_TIMEOUT,
            helped: Mutex::default(),
            kubelet: None,
        }))
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Inner {
            fixed: self.0.fixed.clone(),
            logins: self.0.logins.clone(),
            files: self.0.files.clone(),
            helper_dir: self.0.helper_dir.clone(),
            helper_timeout: self.0.helper_timeout,
            helped: Mutex::default(),
            kubelet: self.0.kubelet.clone(),
        };
        change(&mut inner);
        Self(Arc::new(inner))
    }

    /// Uses a user and password for `host` (with its port), before anything that the files say.
    #[must_use]
    pub fn with_password(&self, host: &str, user: &str, password: Secret) -> Self {
        self.with_credential(host, Credential::Password { user: user.to_owned(), password })
    }

    /// Uses this for `host` (with its port), before anything else.
    #[must_use]
    pub fn with_credential(&self, host: &str, credential: Credential) -> Self {
        self.change(|inner| inner.fixed.push((host.to_owned(), credential)))
    }

    /// Asks `logins` before the files, each time anew.
    #[must_use]
    pub fn with_logins(&self, logins: Arc<dyn Logins>) -> Self {
        self.change(|inner| inner.logins = Some(logins))
    }

    /// Like [`with_password`](Self::with_password) for the form `user:password`; `None` when there is no colon.
    #[must_use]
    pub fn with_user_password(&self, host: &str, text: &str) -> Option<Self> {
        let (user, password) = text.split_once(':')?;
        Some(self.with_password(host, user, Secret::new(password)))
    }

    /// Looks for credential programs in `dir` only and waits for them at most `timeout`; for tests.
    #[must_use]
    pub fn with_helpers(&self, dir: &Path, timeout: Duration) -> Self {
        self.change(|inner| {
            inner.helper_dir = Some(dir.to_owned());
            inner.helper_timeout = timeout;
        })
    }

    /// Asks the kubelet's credential provider plugins when no file has anything: `config` is a
    /// CredentialProviderConfig in YAML or JSON, `bin_dir` where the plugins are.
    #[must_use]
    pub fn with_kubelet(&self, config: &Path, bin_dir: &Path) -> Self {
        let providers = kubelet::Providers::new(config, bin_dir);
        self.change(|inner| inner.kubelet = Some(providers))
    }

    /// Finds the credential for a repository of a host. `fresh` runs a credential program again although it
    /// has answered before; use it after the registry refused the answer.
    pub async fn find(&self, host: &str, repository: &str, fresh: bool) -> Found {
        if let Some((_, credential)) = self.0.fixed.iter().rev().find(|(known, _)| known == host) {
            return Found { credential: credential.clone(), problem: None };
        }
        let kept = self.0.logins.as_ref().and_then(|logins| logins.login(host, repository, fresh));
        if let Some(credential) = kept {
            return Found { credential, problem: None };
        }
        let mut problem = None;
        for path in &self.0.files {
            match self.find_in(path, host, repository, fresh).await {
                Ok(None) => {}
                Ok(Some(credential)) => return Found { credential, problem },
                Err(error) => {
                    let text = format!("credentials: {}: {error}", path.display());
                    tracing::warn!("{text}");
                    problem.get_or_insert(text);
                }
            }
        }
        if let Some(kubelet) = &self.0.kubelet {
            match kubelet.find(host, repository, fresh, self.0.helper_timeout).await {
                Ok(None) => {}
                Ok(Some(credential)) => return Found { credential, problem },
                Err(error) => {
                    let text = format!("credentials: {error}");
                    tracing::warn!("{text}");
                    problem.get_or_insert(text);
                }
            }
        }
        Found { credential: Credential::Anonymous, problem }
    }

    async fn find_in(
        &self,
        path: &Path,
        host: &str,
        repository: &str,
        fresh: bool,
    ) -> Result<Option<Credential>, String> {
        let Some(text) = read_file(path).await? else { return Ok(None) };
        // The parser's own message could quote the file, so only the place is told.
        let file: ConfigFile = serde_json::from_slice(&text)
            .map_err(|error| format!("not valid JSON of this kind at line {}", error.line()))?;
        let keys = keys(host, repository);
        if let Some(program) = keys.iter().find_map(|key| file.cred_helpers.get(key)) {
            return self.ask(program, host, fresh).await;
        }
        let entry = keys.iter().find_map(|key| {
            let same = |(name, _): &(&String, &Entry)| normal(name) == *key;
            file.auths.iter().find(same).filter(|(_, entry)| !entry.is_empty())
        });
        if let Some((name, entry)) = entry {
            return entry.credential().map(Some).map_err(|problem| format!("entry `{name}`: {problem}"));
        }
        match &file.creds_store {
            Some(program) if !program.is_empty() => self.ask(program, host, fresh).await,
            _ => Ok(None),
        }
    }

    /// Runs `docker-credential-PROGRAM get`.
    async fn ask(&self, program: &str, host: &str, fresh: bool) -> Result<Option<Credential>, String> {
        let word = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
        if program.is_empty() || !program.bytes().all(word) {
            return Err("the name of the credential program has strange characters".to_owned());
        }
        let cached = self.0.helped.lock().unwrap_or_else(PoisonError::into_inner).get(host).cloned();
        if let Some(credential) = cached.filter(|_| !fresh) {
            return Ok(Some(credential));
        }
        let name = format!("docker-credential-{program}");
        let path = self.0.helper_dir.as_ref().map_or_else(|| PathBuf::from(&name), |dir| dir.join(&name));
        let server = if host == DOCKER_HUB { DOCKER_HUB_KEY } else { host };
        let found = match tokio::time::timeout(self.0.helper_timeout, run(&path, server)).await {
            Ok(result) => result.map_err(|problem| format!("credential program `{name}`: {problem}"))?,
            Err(_) => {
                let seconds = self.0.helper_timeout.as_secs_f32();
                return Err(format!("credential program `{name}` gave no answer in {seconds} s"));
            }
        };
        if let Some(credential) = &found {
            let mut helped = self.0.helped.lock().unwrap_or_else(PoisonError::into_inner);
            helped.insert(host.to_owned(), credential.clone());
        }
        Ok(found)
    }
}

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    #[serde(default, rename = "credHelpers")]
    cred_helpers: HashMap<String, String>,
    #[serde(default, rename = "credsStore")]
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.auth.is_empty() && self.identitytoken.is_empty() && self.username.is_empty()
    }

    fn credential(&self) -> Result<Credential, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Credential::IdentityToken(Secret::new(&self.identitytoken)));
        }
        if self.auth.is_empty() {
            let password = Secret::new(&self.password);
            return Ok(Credential::Password { user: self.username.clone(), password });
        }
        let engine = base64::engine::GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            base64::engine::GeneralPurposeConfig::new()
                .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
        );
        let bytes = engine.decode(self.auth.trim()).map_err(|_| "`auth` is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "`auth` is not text")?;
        let (user, password) = text.split_once(':').ok_or("`auth` has no colon")?;
        // Docker pads old entries with NUL.
        let password = Secret::new(password.trim_end_matches('\0'));
        Ok(Credential::Password { user: user.to_owned(), password })
    }
}

/// The keys that match, longest first: `host/a/b`, `host/a`, `host`; and Docker Hub's other names.
fn keys(host: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = repository;
    while !path.is_empty() {
        keys.push(format!("{host}/{path}"));
        path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    keys.push(host.to_owned());
    if host == DOCKER_HUB {
        keys.extend(["index.docker.io".to_owned(), "registry-1.docker.io".to_owned()]);
    }
    keys
}

/// A key without what docker puts around the host: `https://`, `/v1/`.
fn normal(key: &str) -> &str {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let bare = bare.unwrap_or(key).trim_end_matches('/');
    bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare)
}

async fn read_file(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).await.map_err(|error| error.to_string())?;
    Ok(Some(text))
}

/// One exchange with a credential program: the host on its input, a document on its output.
async fn run(path: &Path, server: &str) -> Result<Option<Credential>, String> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "Username")]
        user: String,
        #[serde(rename = "Secret")]
        secret: String,
    }
    let mut command = tokio::process::Command::new(path);
    command.arg("get");
    let (status, output) = exchange(command, format!("{server}\n").as_bytes()).await?;
    if !status.success() {
        let text = String::from_utf8_lossy(&output).to_lowercase();
        // The protocol's way to say that there is nothing for this host.
        return if text.contains("not found") { Ok(None) } else { Err(format!("it failed with {status}")) };
    }
    // The output may hold a secret, so an error does not quote it.
    let answer: Answer = serde_json::from_slice(&output)
        .map_err(|_| "it printed something else than the expected JSON".to_owned())?;
    Ok(Some(match answer.user.as_str() {
        "" | "<token>" => Credential::IdentityToken(Secret(answer.secret)),
        _ => Credential::Password { user: answer.user, password: Secret(answer.secret) },
    }))
}

/// Runs a program with something on its input, and gives what it printed.
async fn exchange(
    mut command: tokio::process::Command,
    input: &[u8],
) -> Result<(std::process::ExitStatus, Vec<u8>), String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "it is not installed (looked for it in PATH)".to_owned(),
            _ => error.to_string(),
        })?;
    if let Some(mut pipe) = child.stdin.take() {
        // A program that does not read its input may have ended already; its exit tells.
        let _ = pipe.write_all(input).await;
    }
    let mut output = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        pipe.take(HELPER_OUTPUT + 1).read_to_end(&mut output).await.map_err(|error| error.to_string())?;
    }
    if u64::try_from(output.len()).is_ok_and(|length| length > HELPER_OUTPUT) {
        return Err(format!("it printed more than {HELPER_OUTPUT} bytes"));
    }
    Ok((child.wait().await.map_err(|error| error.to_string())?, output))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password { user: user.into(), password: Secret::new(password) }
    }

    fn file(dir: &Path, text: &str) -> Credentials {
        let path = dir.join("config.json");
        std::fs::write(&path, text).unwrap();
        Credentials::from_files(vec![dir.join("absent.json"), path])
    }

    #[tokio::test]
    async fn entries_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let text = format!(
            r#"{{"auths": {{
                "h.io": {{"auth": "{}"}}, "h.io/team": {{"auth": "{}"}}, "i.io": {{"auth": "{}", "identitytoken": "tok"}},
                "https://index.docker.io/v1/": {{"auth": "{}"}}, "e.io": {{}}, "b.io": {{"auth": "%%"}},
                "u.io": {{"username": "plain", "password": "pw"}} }} }}"#,
            encode("me:pa:ss"),
            encode("team:t"),
            encode("x:y"),
            encode("hub:h")
        );
        let credentials = file(dir.path(), &text);
        let find = async |host: &str, repository: &str| credentials.find(host, repository, false).await;
        assert_eq!(find("h.io", "a/b").await.credential, password("me", "pa:ss"));
        assert_eq!(find("h.io", "team/app").await.credential, password("team", "t"));
        assert_eq!(find("h.io", "teammate").await.credential, password("me", "pa:ss"));
        assert_eq!(find("i.io", "a").await.credential, Credential::IdentityToken(Secret::new("tok")));
        assert_eq!(find("docker.io", "library/a").await.credential, password("hub", "h"));
        assert_eq!(find("u.io", "a").await.credential, password("plain", "pw"));
        assert_eq!(find("e.io", "a").await, Found { credential: Credential::Anonymous, problem: None });
        let broken = find("b.io", "a").await;
        assert!(broken.problem.unwrap().contains("`b.io`"));
        let fixed = credentials.with_user_password("h.io", "cli:a:b").unwrap();
        assert_eq!(fixed.find("h.io", "a", false).await.credential, password("cli", "a:b"));
        assert_eq!(fixed.find("h.io:5000", "a", false).await.credential, Credential::Anonymous);
    }

    #[tokio::test]
    async fn a_broken_file_is_told_without_its_text() {
        let dir = tempfile::tempdir().unwrap();
        let found = file(dir.path(), r#"{"auths": "hunter2"}"#).find("h.io", "a", false).await;
        assert_eq!(found.credential, Credential::Anonymous);
        let problem = found.problem.unwrap();
        assert!(problem.contains("config.json") && !problem.contains("hunter2"), "{problem}");
    }

    #[tokio::test]
    async fn credential_programs() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, script: &str| {
            let path = dir.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        };
        program("good", r#"read host; echo "{\"Username\":\"u-$host\",\"Secret\":\"s\"}""#);
        program("token", r#"echo '{"Username":"<token>","Secret":"s"}'"#);
        program("hangs", "exec sleep 60");
        program("junk", "echo hunter2");
        program("none", "echo credentials not found in native keychain; exit 1");
        program("floods", "exec yes");
        let text = r#"{"credHelpers": {"good.io": "good", "token.io": "token", "hangs.io": "hangs", "junk.io": "junk",
            "none.io": "none", "floods.io": "floods", "absent.io": "absent", "evil.io": "../x"}, "credsStore": "good"}"#;
        let credentials = file(dir.path(), text).with_helpers(dir.path(), Duration::from_millis(700));
        let find = async |host: &str| credentials.find(host, "a", false).await;
        assert_eq!(find("good.io").await.credential, password("u-good.io", "s"));
        assert_eq!(find("store.io").await.credential, password("u-store.io", "s"));
        assert_eq!(find("token.io").await.credential, Credential::IdentityToken(Secret::new("s")));
        assert_eq!(find("none.io").await, Found { credential: Credential::Anonymous, problem: None });
        for (host, word) in [
            ("hangs.io", "no answer"),
            ("junk.io", "docker-credential-junk"),
            ("floods.io", "more than"),
            ("absent.io", "docker-credential-absent"),
            ("evil.io", "strange"),
        ] {
            let found = find(host).await;
            assert_eq!(found.credential, Credential::Anonymous, "{host}");
            let problem = found.problem.unwrap();
            assert!(problem.contains(word) && !problem.contains("hunter2"), "{host}: {problem}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = Credentials::anonymous().with_password("h.io", "me", Secret::new("hunter2"));
        assert!(!format!("{credentials:?} {:?}", password("me", "hunter2")).contains("hunter2"));
    }
}
