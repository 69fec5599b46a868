//! PAX extended headers: records "LENGTH KEY=VALUE\n" where LENGTH counts the whole record, so that values may hold any
//! byte, line ends included.

use crate::error::{EntryProblem, show};
use crate::tar::sparse::PaxSparse;
use crate::tree::RawXattr;

/// What the PAX and GNU extensions in front of an entry say about it.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<RawXattr>,
    pub(super) sparse: PaxSparse,
}

impl Extensions {
    pub(super) fn is_empty(&self) -> bool {
        let Self { path, link, size, uid, gid, mtime, xattrs, sparse } = self;
        path.is_none()
            && link.is_none()
            && size.is_none()
            && uid.is_none()
            && gid.is_none()
            && mtime.is_none()
            && xattrs.is_empty()
            && *sparse == PaxSparse::default()
    }

    /// Takes the records of one extended header.
    pub(super) fn add_pax(&mut self, mut records: &[u8]) -> Result<(), EntryProblem> {
        while !records.is_empty() {
            let (record, rest) = split_record(records)?;
            records = rest;
            self.add(record.key, record.value)?;
        }
        Ok(())
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), EntryProblem> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse.add(name, value);
        }
        // An empty value takes back what an earlier header said.
        let given = !value.is_empty();
        match key {
            b"path" => self.path = given.then(|| value.to_vec()),
            b"linkpath" => self.link = given.then(|| value.to_vec()),
            b"size" => self.size = given.then(|| decimal(key, value)).transpose()?,
            b"uid" => self.uid = given.then(|| decimal(key, value)).transpose()?,
            b"gid" => self.gid = given.then(|| decimal(key, value)).transpose()?,
            b"mtime" => self.mtime = given.then(|| time(value)).transpose()?,
            // Other times, user names, comments, charsets and vendor keys have no place in an image.
            _ => {}
        }
        Ok(())
    }
}

struct Record<'r> {
    key: &'r [u8],
    value: &'r [u8],
}

/// Takes the first record off.
fn split_record(records: &[u8]) -> Result<(Record<'_>, &[u8]), EntryProblem> {
    let bad = |why: &str| {
        let start = &records[..records.len().min(40)];
        EntryProblem::Header(format!("PAX record \"{}\" {why}", show(start)))
    };
    let space = records.iter().take(20).position(|&b| b == b' ').ok_or_else(|| bad("has no length"))?;
    let len = decimal(b"length", &records[..space])?;
    let len = usize::try_from(len).ok().filter(|&len| len > space + 1 && len <= records.len());
    let len = len.ok_or_else(|| bad("has a length that leaves the extended header"))?;
    let (record, rest) = records.split_at(len);
    let body = record[space + 1..].strip_suffix(b"\n").ok_or_else(|| bad("does not end in a line end"))?;
    let equals = body.iter().position(|&b| b == b'=').ok_or_else(|| bad("has no \"=\""))?;
    Ok((Record { key: &body[..equals], value: &body[equals + 1..] }, rest))
}

/// Reads a decimal number.
pub(super) fn decimal(what: &[u8], text: &[u8]) -> Result<u64, EntryProblem> {
    let value = text.iter().try_fold(0u64, |value, &byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    });
    value.filter(|_| !text.is_empty()).ok_or_else(|| {
        let text = &text[..text.len().min(40)];
        EntryProblem::Header(format!("PAX {} \"{}\" is not a decimal number", show(what), show(text)))
    })
}

/// Reads "[-]SECONDS[.FRACTION]". A fraction is cut to nanoseconds, always towards the past.
fn time(text: &[u8]) -> Result<(i64, u32), EntryProblem> {
    let bad =
        || EntryProblem::Header(format!("PAX mtime \"{}\" is not a time", show(&text[..text.len().min(40)])));
    let (negative, digits) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let point = digits.iter().position(|&b| b == b'.');
    let (whole, fraction) = point.map_or((digits, &b""[..]), |at| (&digits[..at], &digits[at + 1..]));
    let seconds = decimal(b"mtime", whole).ok().and_then(|s| i64::try_from(s).ok()).ok_or_else(bad)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let digit = |at: usize| u32::from(fraction.get(at).map_or(0, |byte| byte - b'0'));
    let nanos = (0..9).fold(0, |value, at| value * 10 + digit(at));
    if !negative {
        return Ok((seconds, nanos));
    }
    let is_cut = fraction.iter().skip(9).any(|&byte| byte != b'0');
    let nanos = nanos + u32::from(is_cut);
    if nanos == 0 { Ok((-seconds, 0)) } else { Ok((-seconds - 1, 1_000_000_000 - nanos)) }
}

impl Extensions {
    /// Whether the entry is a sparse file in one of the PAX forms.
    pub(super) fn is_sparse(&self) -> bool {
        self.sparse.is_sparse()
    }

    pub(super) fn take_sparse(&mut self) -> PaxSparse {
        std::mem::take(&mut self.sparse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = body.len() + 1;
        while len.to_string().len() + body.len() != len {
            len = len.to_string().len() + body.len();
        }
        [len.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn values_may_hold_line_ends_and_equals() {
        let mut all = record("SCHILY.xattr.security.capability", b"\x01\n9 a=b\n\0");
        all.extend(record("path", "p\u{e9}\n".as_bytes()));
        let mut ext = Extensions::default();
        assert!(ext.is_empty());
        ext.add_pax(&all).unwrap();
        assert_eq!(ext.xattrs, [(b"security.capability".to_vec(), b"\x01\n9 a=b\n\0".to_vec())]);
        assert_eq!(ext.path.as_deref(), Some("p\u{e9}\n".as_bytes()));
        ext.add_pax(&record("path", b"")).unwrap();
        assert_eq!(ext.path, None);
    }

    #[test]
    fn broken_records() {
        for bad in [
            &b"5 a=b"[..],
            b"6 a=b\n6",
            b"99 a=b\n",
            b"0 a=b\n",
            b"2 a=b\n",
            b"x a=b\n",
            b"5 ab\n",
            b"18446744073709551616 a=b\n",
            b"aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ] {
            assert!(Extensions::default().add_pax(bad).is_err(), "{}", show(bad));
        }
        assert!(Extensions::default().add_pax(&record("size", b"-1")).is_err());
    }

    #[test]
    fn times() {
        assert_eq!(time(b"1").unwrap(), (1, 0));
        assert_eq!(time(b"1.5").unwrap(), (1, 500_000_000));
        assert_eq!(time(b"1.1234567899").unwrap(), (1, 123_456_789));
        assert_eq!(time(b"-1").unwrap(), (-1, 0));
        assert_eq!(time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert_eq!(time(b"-0.0000000001").unwrap(), (-1, 999_999_999));
        assert!(time(b"1.x").is_err());
        assert!(time(b".5").is_err());
        assert!(time(b"99999999999999999999").is_err());
    }
}
