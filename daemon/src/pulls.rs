//! Logins that pods' pulls had: what is read of their images later is asked for with them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skimmer_client::Credentials;
use skimmer_fetcher::credentials::{Credential, Logins, Secret};
use skimmer_fetcher::reference::RegistryRef;

use crate::mounts::now_ms;
use crate::store::{StoreError, records};

/// How long a login is kept without an image that needs it: its pull may still be under way.
const UNUSED: Duration = Duration::from_secs(3600);
/// Repositories whose logins are kept at most, and logins of one while pulls are under way.
const MAX_REPOSITORIES: usize = 4096;
const MAX_LOGINS: usize = 4;

/// The logins, by repository. They also lie in the runtime directory, mode 0600, for the next daemon of this boot.
#[derive(Debug)]
pub struct Pulls {
    path: PathBuf,
    by_repository: Mutex<BTreeMap<String, Pulled>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pulled {
    /// The newest is the last.
    logins: Vec<Credentials>,
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

    /// Takes a login for an image's repository before any older one. Says whether it was known.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn put(&self, image: &RegistryRef, login: Credentials) -> Result<bool, StoreError> {
        let mut was_known = false;
        self.change(|all| {
            let pulled = all.entry(key(image.host(), image.repository())).or_default();
            was_known = pulled.logins.contains(&login);
            let is_last = pulled.logins.last() == Some(&login);
            pulled.since_ms = now_ms();
            pulled.logins.retain(|known| *known != login);
            pulled.logins.push(login);
            if pulled.logins.len() > MAX_LOGINS {
                pulled.logins.remove(0);
            }
            while all.len() > MAX_REPOSITORIES
                && let Some(oldest) =
                    all.iter().min_by_key(|(_, pulled)| pulled.since_ms).map(|(name, _)| name.clone())
            {
                all.remove(&oldest);
            }
            !is_last
        })?;
        Ok(was_known)
    }

    /// Forgets a login.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn remove(&self, image: &RegistryRef, login: &Credentials) -> Result<(), StoreError> {
        self.change(|all| {
            let Some(pulled) = all.get_mut(&key(image.host(), image.repository())) else { return false };
            let before = pulled.logins.len();
            pulled.logins.retain(|known| known != login);
            pulled.logins.len() < before
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
        let mut all = self.by_repository.lock().unwrap_or_else(PoisonError::into_inner);
        if change(&mut all) { records::save(&self.path, &*all) } else { Ok(()) }
    }
}

impl Logins for Pulls {
    fn login(&self, host: &str, repository: &str) -> Option<Credential> {
        let all = self.by_repository.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = all.get(&key(host, repository))?.logins.last()?;
        Some(credential(newest))
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

    fn known(pulls: &Pulls, repository: &str) -> Option<String> {
        match pulls.login("h.io", repository)? {
            Credential::Password { password, .. } => Some(password.reveal().to_owned()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_newest_login_counts_and_a_failed_one_does_not() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pulled.json");
        let pulls = Pulls::open(path.clone());
        let app = image("h.io/team/app:1");
        assert!(!pulls.put(&app, login("old")).unwrap());
        assert!(!pulls.put(&app, login("new")).unwrap());
        assert!(pulls.put(&app, login("new")).unwrap());
        assert_eq!(known(&pulls, "team/app").as_deref(), Some("new"));
        assert_eq!(known(&pulls, "team/other"), None);
        pulls.put(&image("h.io/team/app:2"), login("wrong")).unwrap();
        pulls.remove(&app, &login("wrong")).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let later = Pulls::open(path.clone());
        assert_eq!(known(&later, "team/app").as_deref(), Some("new"));
        // Still within its hour.
        later.retain(std::iter::empty()).unwrap();
        assert_eq!(known(&later, "team/app").as_deref(), Some("new"));
        for all in later.by_repository.lock().unwrap().values_mut() {
            all.since_ms = 0;
        }
        later.retain(std::iter::once(&app)).unwrap();
        assert_eq!(known(&later, "team/app").as_deref(), Some("new"));
        later.retain(std::iter::empty()).unwrap();
        assert_eq!(known(&Pulls::open(path), "team/app"), None);
    }

    #[test]
    fn many_logins_do_not_pile_up() {
        let dir = tempfile::tempdir().unwrap();
        let pulls = Pulls::open(dir.path().join("pulled.json"));
        for number in 0..20 {
            pulls.put(&image("h.io/a"), login(&number.to_string())).unwrap();
        }
        assert_eq!(pulls.by_repository.lock().unwrap()["h.io/a"].logins.len(), MAX_LOGINS);
    }
}
