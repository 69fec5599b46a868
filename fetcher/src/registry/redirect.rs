//! Redirects: where one may lead, and how long its target may be used again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use url::Url;

use crate::digest::Digest;
use crate::http::{HttpOptions, host_of};

/// Redirects that one request may follow.
pub(crate) const MAX_HOPS: u32 = 10;
/// Targets that are remembered.
const MAX_TARGETS: usize = 1000;
/// How long a target without a known expiry is used again.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// No target is used longer than this.
const MAX_LIFE: Duration = Duration::from_secs(3600);

/// Resolves a `Location` and refuses what may not be followed.
pub(crate) fn resolve(from: &Url, location: &str, options: &HttpOptions) -> Result<Url, String> {
    let mut next = from.join(location).map_err(|_| "redirect to something that is no URL".to_owned())?;
    let host = host_of(&next);
    match next.scheme() {
        "https" => {}
        "http" if from.scheme() == "https" && !options.is_marked_insecure(&host) => {
            return Err(format!("redirect from https to plain http at {host}"));
        }
        "http" if options.allows_plain(&host) => {}
        "http" => return Err(format!("redirect to plain http at {host}, which is not marked as insecure")),
        other => return Err(format!("redirect to a URL with the scheme `{other}`")),
    }
    // A user name in a redirect would become an Authorization header.
    if !next.username().is_empty() || next.password().is_some() {
        return Err(format!("redirect to {host} with a user name in the URL"));
    }
    next.set_fragment(None);
    Ok(next)
}

/// How long a redirect target may be used: 80 % of what its signature says, or a minute.
pub(crate) fn life(target: &Url, now: SystemTime) -> Duration {
    let param = |name: &str| {
        target
            .query_pairs()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.into_owned())
    };
    let epoch = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let signed = |prefix: &str| -> Option<u64> {
        let start = basic_date(&param(&format!("{prefix}-Date"))?)?;
        start.checked_add(param(&format!("{prefix}-Expires"))?.parse().ok()?)
    };
    let end = signed("X-Amz")
        .or_else(|| signed("X-Goog"))
        .or_else(|| param("Expires")?.parse().ok())
        .or_else(|| azure_date(&param("se")?));
    let life = end.map_or(DEFAULT_LIFE, |end| Duration::from_secs(end.saturating_sub(epoch)).mul_f64(0.8));
    life.min(MAX_LIFE)
}

/// Seconds since 1970 of `YYYYMMDDTHHMMSSZ`.
fn basic_date(text: &str) -> Option<u64> {
    let part = |range: std::ops::Range<usize>| text.get(range);
    if text.len() != 16 || part(8..9)? != "T" || part(15..16)? != "Z" {
        return None;
    }
    seconds([part(0..4)?, part(4..6)?, part(6..8)?, part(9..11)?, part(11..13)?, part(13..15)?])
}

/// Seconds since 1970 of `YYYY-MM-DDTHH:MM:SSZ`.
fn azure_date(text: &str) -> Option<u64> {
    let part = |range: std::ops::Range<usize>| text.get(range);
    seconds([part(0..4)?, part(5..7)?, part(8..10)?, part(11..13)?, part(14..16)?, part(17..19)?])
}

fn seconds(parts: [&str; 6]) -> Option<u64> {
    let [year, month, day, hour, minute, second] = parts;
    // httpdate checks the calendar; the week day does not count, so every one is tried.
    let month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        .get(month.parse::<usize>().ok()?.checked_sub(1)?)?;
    let date = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].iter().find_map(|week| {
        httpdate::parse_http_date(&format!("{week}, {day} {month} {year} {hour}:{minute}:{second} GMT")).ok()
    })?;
    date.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

/// Redirect targets of blobs, so that not every range costs two requests.
#[derive(Default)]
pub(crate) struct Targets(Mutex<HashMap<Digest, (Url, Instant)>>);

impl Targets {
    pub(crate) fn get(&self, blob: &Digest) -> Option<Url> {
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match targets.get(blob) {
            Some((url, until)) if *until > Instant::now() => Some(url.clone()),
            Some(_) => {
                targets.remove(blob);
                None
            }
            None => None,
        }
    }

    pub(crate) fn put(&self, blob: Digest, url: Url) {
        let now = Instant::now();
        let life = life(&url, SystemTime::now());
        let mut targets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.len() >= MAX_TARGETS {
            targets.retain(|_, (_, until)| *until > now);
            if targets.len() >= MAX_TARGETS {
                targets.clear();
            }
        }
        targets.insert(blob, (url, now + life));
    }

    pub(crate) fn drop_target(&self, blob: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(blob);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn where_a_redirect_may_lead() {
        let options = HttpOptions { insecure: vec!["lab".into()], ..HttpOptions::default() };
        let secure = url("https://h.io/v2/a/blobs/x");
        let plain = url("http://127.0.0.1:5000/v2/a/blobs/x");
        assert_eq!(resolve(&secure, "/other?x=1#y", &options).unwrap().as_str(), "https://h.io/other?x=1");
        assert_eq!(resolve(&plain, "../y", &options).unwrap().as_str(), "http://127.0.0.1:5000/v2/a/y");
        assert!(resolve(&secure, "https://cdn.io/z", &options).is_ok());
        assert!(resolve(&secure, "http://lab/z", &options).is_ok());
        assert!(resolve(&plain, "http://[::1]/z", &options).is_ok());
        for bad in
            ["http://h.io/", "http://127.0.0.1/", "file:///etc/passwd", "https://u:p@cdn.io/", "http://["]
        {
            assert!(resolve(&secure, bad, &options).is_err(), "{bad}");
        }
        assert!(resolve(&plain, "http://example.org/", &options).is_err());
    }

    #[test]
    fn lives_of_signed_urls() {
        let now = httpdate::parse_http_date("Fri, 20 Nov 2026 12:00:00 GMT").unwrap();
        let epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let seconds = |text: &str| life(&url(text), now).as_secs();
        assert_eq!(seconds("https://s3/x?X-Amz-Date=20261120T115900Z&X-Amz-Expires=160"), 80);
        assert_eq!(seconds("https://g/x?X-Goog-Date=20261120T120000Z&X-Goog-Expires=100"), 80);
        assert_eq!(seconds(&format!("https://c/x?Expires={}", epoch + 100)), 80);
        assert_eq!(seconds("https://a/x?se=2026-11-20T12:01:40Z&sig=x"), 80);
        assert_eq!(seconds("https://n/x"), 60);
        assert_eq!(seconds("https://s3/x?X-Amz-Date=20261120T110000Z&X-Amz-Expires=160"), 0);
        assert_eq!(seconds("https://s3/x?X-Amz-Date=junk&X-Amz-Expires=160"), 60);
        assert_eq!(seconds("https://c/x?Expires=99999999999999"), 3600);
    }
}
