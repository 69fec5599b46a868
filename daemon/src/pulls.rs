//! Logins that pods' pulls had: what is read of their images later is asked for with them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skimmer_client::Credentials;
use skimmer_fetcher::credentials::{Credential, Logins, Secret};
use skimmer_fetcher::reference::RegistryRef;

use crate::mounts::now_ms;
use crate::store::{StoreError, records};

/// How long a login is kept without an image that needs it: its pull may still be under way.
const UNUSED: Duration = Duration::from_secs(3600);
/// Repositories whose logins are kept at most, and logins of pulls under way of each.
const MAX_REPOSITORIES: usize = 4096;
const MAX_OFFERED: usize = 64;

/// The logins, by repository. Those of pulls that succeeded also lie in the runtime directory, mode 0600, for the next
/// daemon of this boot.
#[derive(Debug)]
pub struct Pulls {
    path: PathBuf,
    by_repository: Mutex<BTreeMap<String, Pulled>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pulled {
    /// That of the last pull that succeeded.
    proved: Option<Credentials>,
    /// Those of pulls under way, once for each; the newest is the last.
    #[serde(skip)]
    offered: Vec<Credentials>,
    /// When the newest came, milliseconds since 1970.
    since_ms: u64,
}

impl Pulls {
    /// Reads what an earlier daemon of this boot kept; a file that cannot be understood is dropped with a log line.
    pub fn open(path: PathBuf) -> Self {
        let by_repository = records::load(&path).unwrap_or_else(|error| {
            tracing::warn!("{error}; images of private registries have to be pulled again");
            None
        });
        Self { path, by_repository: Mutex::new(by_repository.unwrap_or_default()) }
    }

    /// A pull of the image begins: its login is tried where there is no better one.
    pub fn offer(&self, image: &RegistryRef, login: Credentials) {
        let mut all = self.all();
        let pulled = all.entry(key(image.host(), image.repository())).or_default();
        pulled.since_ms = now_ms();
        pulled.offered.push(login);
        if pulled.offered.len() > MAX_OFFERED {
            pulled.offered.remove(0);
        }
        while all.len() > MAX_REPOSITORIES
            && let Some(oldest) =
                all.iter().min_by_key(|(_, pulled)| pulled.since_ms).map(|(name, _)| name.clone())
        {
            all.remove(&oldest);
        }
    }

    /// The pull of an offer is over. If it succeeded, its login is the repository's from now on.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn settle(&self, image: &RegistryRef, login: Credentials, succeeded: bool) -> Result<(), StoreError> {
        self.change(|all| {
            let pulled = all.entry(key(image.host(), image.repository())).or_default();
            if let Some(at) = pulled.offered.iter().rposition(|offered| *offered == login) {
                pulled.offered.remove(at);
            }
            if !succeeded || pulled.proved.as_ref() == Some(&login) {
                return false;
            }
            pulled.since_ms = now_ms();
            pulled.proved = Some(login);
            true
        })
    }

    /// Forgets the logins of repositories of which no image is in `used` and none was pulled for an hour.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn retain<'a>(&self, used: impl Iterator<Item = &'a RegistryRef>) -> Result<(), StoreError> {
        let used: Vec<String> = used.map(|image| key(image.host(), image.repository())).collect();
        let limit = now_ms().saturating_sub(u64::try_from(UNUSED.as_millis()).unwrap_or(u64::MAX));
        self.change(|all| {
            let before = all.len();
            all.retain(|name, pulled| pulled.since_ms > limit || used.contains(name));
            all.len() < before
        })
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Pulled>) -> bool) -> Result<(), StoreError> {
        let mut all = self.all();
        if change(&mut all) { records::save(&self.path, &*all) } else { Ok(()) }
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Pulled>> {
        self.by_repository.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Logins for Pulls {
    fn login(&self, host: &str, repository: &str, refused: bool) -> Option<Credential> {
        let all = self.all();
        let Pulled { proved, offered, .. } = all.get(&key(host, repository))?;
        // What running containers read with must not depend on what somebody else is trying. Behind both there are the
        // node's own credentials.
        proved.as_ref().filter(|_| !refused).or(offered.last()).map(credential)
    }
}

/// What a login is to a registry: without a user's name the password is an identity token.
pub fn credential(login: &Credentials) -> Credential {
    let secret = Secret::new(&login.password);
    match login.username.as_str() {
        "" => Credential::IdentityToken(secret),
        user => Credential::Password { user: user.to_owned(), password: secret },
    }
}

fn key(host: &str, repository: &str) -> String {
    format!("{host}/{repository}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(password: &str) -> Credentials {
        Credentials { username: "u".into(), password: password.into() }
    }

    fn image(name: &str) -> RegistryRef {
        RegistryRef::parse(name).unwrap()
    }

    fn known(pulls: &Pulls, repository: &str, refused: bool) -> Option<String> {
        match pulls.login("h.io", repository, refused)? {
            Credential::Password { password, .. } => Some(password.reveal().to_owned()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_login_counts_once_a_pull_has_succeeded_with_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pulled.json");
        let pulls = Pulls::open(path.clone());
        let app = image("h.io/team/app:1");
        pulls.offer(&app, login("old"));
        assert_eq!(known(&pulls, "team/app", false).as_deref(), Some("old"), "there is no other");
        pulls.settle(&app, login("old"), true).unwrap();
        assert_eq!(known(&pulls, "team/other", false), None);
        // While another one is tried, it is shown only where the good one was refused.
        pulls.offer(&image("h.io/team/app:2"), login("new"));
        pulls.offer(&app, login("new"));
        assert_eq!(known(&pulls, "team/app", false).as_deref(), Some("old"));
        assert_eq!(known(&pulls, "team/app", true).as_deref(), Some("new"));
        pulls.settle(&app, login("new"), false).unwrap();
        assert_eq!(known(&pulls, "team/app", true).as_deref(), Some("new"), "of the other pull");
        pulls.settle(&app, login("new"), false).unwrap();
        assert_eq!(known(&pulls, "team/app", true), None);
        // A good login stays, whatever a pull with it fails for.
        pulls.offer(&app, login("old"));
        pulls.settle(&app, login("old"), false).unwrap();
        assert_eq!(known(&pulls, "team/app", false).as_deref(), Some("old"));
        pulls.settle(&app, login("new"), true).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let later = Pulls::open(path.clone());
        assert_eq!(known(&later, "team/app", false).as_deref(), Some("new"));
        // Still within its hour.
        later.retain(std::iter::empty()).unwrap();
        assert_eq!(known(&later, "team/app", false).as_deref(), Some("new"));
        for all in later.all().values_mut() {
            all.since_ms = 0;
        }
        later.retain(std::iter::once(&app)).unwrap();
        assert_eq!(known(&later, "team/app", false).as_deref(), Some("new"));
        later.retain(std::iter::empty()).unwrap();
        assert_eq!(known(&Pulls::open(path), "team/app", false), None);
    }

    #[test]
    fn many_logins_do_not_pile_up() {
        let dir = tempfile::tempdir().unwrap();
        let pulls = Pulls::open(dir.path().join("pulled.json"));
        for number in 0..2 * MAX_OFFERED {
            pulls.offer(&image("h.io/a"), login(&number.to_string()));
        }
        assert_eq!(pulls.all()["h.io/a"].offered.len(), MAX_OFFERED);
    }
}
