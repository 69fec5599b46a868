//! Maps of sparse files: the old GNU form in header blocks, and the PAX forms 0.0, 0.1 and 1.0.

use crate::error::EntryProblem;
use crate::tar::pax::decimal;

/// Most data ranges of one sparse file. A map of a million ranges takes 24 MB in the tar.
pub(super) const EXTENTS_MAX: usize = 1 << 20;

/// A range of a sparse file that has data in the tar. All other ranges are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// What PAX records with the prefix "GNU.sparse." say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    major: Option<u64>,
    minor: Option<u64>,
    size: Option<u64>,
    /// Numbers of the map: start, length, start, length, …
    map: Vec<u64>,
    has_map: bool,
}

impl PaxSparse {
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), EntryProblem> {
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(decimal(key, value)?),
            b"minor" => self.minor = Some(decimal(key, value)?),
            b"size" | b"realsize" => self.size = Some(decimal(key, value)?),
            b"numblocks" => self.has_map = true,
            b"offset" | b"numbytes" => {
                // Version 0.0: pairs of records.
                let is_start = self.map.len().is_multiple_of(2);
                if is_start != (key == b"offset") || self.map.len() >= 2 * EXTENTS_MAX {
                    return Err(EntryProblem::Sparse("offsets and lengths do not alternate".to_owned()));
                }
                self.has_map = true;
                self.map.push(decimal(key, value)?);
            }
            b"map" => {
                self.has_map = true;
                self.map.clear();
                if !value.is_empty() {
                    for number in value.split(|&byte| byte == b',') {
                        if self.map.len() >= 2 * EXTENTS_MAX {
                            return Err(too_many());
                        }
                        self.map.push(decimal(key, number)?);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.has_map || self.major.is_some()
    }

    /// The file's size and the place of its map.
    pub(super) fn form(&self) -> Result<(u64, PaxMap), EntryProblem> {
        let size = self.size.ok_or_else(|| EntryProblem::Sparse("the file's size is missing".to_owned()))?;
        match (self.major, self.minor) {
            (Some(1), Some(0) | None) => Ok((size, PaxMap::InData)),
            (None | Some(0), _) if self.has_map => Ok((size, PaxMap::Given(extents(&self.map)?))),
            (major, minor) => {
                let show = |n: Option<u64>| n.map_or("?".to_owned(), |n| n.to_string());
                Err(EntryProblem::Sparse(format!("unknown version {}.{}", show(major), show(minor))))
            }
        }
    }
}

/// Where a PAX sparse map is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PaxMap {
    /// In the records.
    Given(Vec<Extent>),
    /// At the start of the entry's data.
    InData,
}

fn too_many() -> EntryProblem {
    EntryProblem::Sparse(format!("more than {EXTENTS_MAX} ranges"))
}

fn extents(numbers: &[u64]) -> Result<Vec<Extent>, EntryProblem> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(EntryProblem::Sparse("the last range has no length".to_owned()));
    }
    Ok(pairs.iter().map(|&[start, len]| Extent { start, len }).collect())
}

/// Reads the map of version 1.0 from a source of bytes: decimal lines, first the number of ranges.
pub(super) fn read_map<E: From<EntryProblem>>(
    mut next: impl FnMut() -> Result<u8, E>,
) -> Result<Vec<Extent>, E> {
    let mut line = || -> Result<u64, E> {
        let mut value: Option<u64> = None;
        loop {
            match next()? {
                b'\n' => {
                    return value
                        .ok_or_else(|| EntryProblem::Sparse("an empty line in the map".to_owned()).into());
                }
                digit @ b'0'..=b'9' => {
                    let sum =
                        value.unwrap_or(0).checked_mul(10).and_then(|v| v.checked_add((digit - b'0').into()));
                    value = Some(sum.ok_or_else(|| {
                        EntryProblem::Sparse("a number of the map is too large".to_owned())
                    })?);
                }
                _ => {
                    return Err(
                        EntryProblem::Sparse("the map is not made of decimal numbers".to_owned()).into()
                    );
                }
            }
        }
    };
    let count = line()?;
    if usize::try_from(count).map_or(true, |count| count > EXTENTS_MAX) {
        return Err(too_many().into());
    }
    let mut extents = Vec::new();
    for _ in 0..count {
        extents.push(Extent { start: line()?, len: line()? });
    }
    Ok(extents)
}

/// Checks that ranges are in order, do not overlap, lie in the file, and have as many bytes as are stored.
pub(super) fn check(extents: &[Extent], size: u64, stored: u64) -> Result<(), EntryProblem> {
    let mut end = 0u64;
    let mut total = 0u64;
    for Extent { start, len } in extents {
        let next = start.checked_add(*len).filter(|&next| *start >= end && next <= size);
        end = next.ok_or_else(|| {
            EntryProblem::Sparse(format!(
                "range {start}+{len} overlaps another or leaves the file of {size} bytes"
            ))
        })?;
        // Ranges do not overlap and lie in the file, so the sum is at most its size.
        total += len;
    }
    if total != stored {
        return Err(EntryProblem::Sparse(format!("its ranges have {total} bytes, but {stored} are stored")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_0_0_and_0_1() {
        let mut old = PaxSparse::default();
        for (key, value) in [
            ("size", "100"),
            ("numblocks", "2"),
            ("offset", "10"),
            ("numbytes", "5"),
            ("offset", "50"),
            ("numbytes", "50"),
        ] {
            old.add(key.as_bytes(), value.as_bytes()).unwrap();
        }
        let mut new = PaxSparse::default();
        new.add(b"size", b"100").unwrap();
        new.add(b"map", b"10,5,50,50").unwrap();
        let expected = PaxMap::Given(vec![Extent { start: 10, len: 5 }, Extent { start: 50, len: 50 }]);
        assert_eq!(old.form().unwrap(), (100, expected));
        assert_eq!(old.form().unwrap(), new.form().unwrap());
        assert!(new.add(b"map", b"1,,2").is_err());
        assert!(old.add(b"numbytes", b"1").is_err());
    }

    #[test]
    fn pax_1_0() {
        let mut sparse = PaxSparse::default();
        for (key, value) in [("major", "1"), ("minor", "0"), ("realsize", "9")] {
            sparse.add(key.as_bytes(), value.as_bytes()).unwrap();
        }
        assert_eq!(sparse.form().unwrap(), (9, PaxMap::InData));
        let mut bytes = b"2\n0\n1\n8\n1\n".iter().copied();
        let map = read_map(|| bytes.next().ok_or(EntryProblem::BadWhiteout)).unwrap();
        assert_eq!(map, [Extent { start: 0, len: 1 }, Extent { start: 8, len: 1 }]);
        check(&map, 9, 2).unwrap();
        for bad in [&b"1\n"[..], b"x\n", b"\n", b"99999999999\n", b"99999999999999999999999\n"] {
            let mut bytes = bad.iter().copied();
            assert!(read_map(|| bytes.next().ok_or(EntryProblem::BadWhiteout)).is_err());
        }
    }

    #[test]
    fn maps_are_checked() {
        let at = |start, len| Extent { start, len };
        check(&[at(0, 5), at(5, 5)], 10, 10).unwrap();
        check(&[at(10, 0)], 10, 0).unwrap();
        assert!(check(&[at(0, 6), at(5, 5)], 10, 11).is_err());
        assert!(check(&[at(5, 6)], 10, 6).is_err());
        assert!(check(&[at(u64::MAX, 2)], u64::MAX, 2).is_err());
        assert!(check(&[at(0, 5)], 10, 6).is_err());
    }
}
