//! Every difference between two listings, by name.

use std::collections::BTreeMap;
use std::fmt;

use super::entry::{Entry, Kind};

/// One thing in which two trees differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// A name that only the first tree has.
    OnlyLeft(String),
    /// A name that only the second tree has.
    OnlyRight(String),
    /// A name that both have, and what of it differs.
    Field {
        /// The path, escaped.
        path: String,
        /// What differs.
        field: String,
        /// Its value in the first tree.
        left: String,
        /// Its value in the second tree.
        right: String,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::OnlyLeft(path) => write!(f, "{path}: only in the first tree"),
            Difference::OnlyRight(path) => write!(f, "{path}: only in the second tree"),
            Difference::Field { path, field, left, right } => write!(f, "{path}: {field}: {left} | {right}"),
        }
    }
}

/// All differences between two listings, in the order of paths.
///
/// Sizes of directories and special files, which are the file system's own affair, are not compared.
#[must_use]
pub fn compare(left: &[Entry], right: &[Entry]) -> Vec<Difference> {
    let mut differences = Vec::new();
    let right_by_path: BTreeMap<&str, &Entry> =
        right.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    let left_by_path: BTreeMap<&str, &Entry> =
        left.iter().map(|entry| (entry.path.as_str(), entry)).collect();
    for (path, entry) in &left_by_path {
        match right_by_path.get(path) {
            None => differences.push(Difference::OnlyLeft((*path).to_owned())),
            Some(other) => fields(entry, other, &mut differences),
        }
    }
    let extra = right_by_path.keys().filter(|path| !left_by_path.contains_key(*path));
    differences.extend(extra.map(|path| Difference::OnlyRight((*path).to_owned())));
    differences
}

/// The first differences as text, one a line, and how many there are in all.
#[must_use]
pub fn report(differences: &[Difference]) -> String {
    const SHOWN: usize = 40;
    let mut text: String =
        differences.iter().take(SHOWN).map(|difference| format!("{difference}\n")).collect();
    if differences.len() > SHOWN {
        text.push_str(&format!("… and {} more\n", differences.len() - SHOWN));
    }
    text
}

fn fields(left: &Entry, right: &Entry, differences: &mut Vec<Difference>) {
    let mut check = |field: &str, a: String, b: String| {
        if a != b {
            let (path, field) = (left.path.clone(), field.to_owned());
            differences.push(Difference::Field { path, field, left: a, right: b });
        }
    };
    let optional = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
    check("type", format!("{:?}", left.kind), format!("{:?}", right.kind));
    check("mode", left.mode.clone(), right.mode.clone());
    check("uid", left.uid.to_string(), right.uid.to_string());
    check("gid", left.gid.to_string(), right.gid.to_string());
    if [left, right].iter().all(|entry| matches!(entry.kind, Kind::File | Kind::Symlink)) {
        check("size", left.size.to_string(), right.size.to_string());
    }
    let time = |entry: &Entry| format!("{}.{:09}", entry.mtime, entry.mtime_ns);
    check("mtime", time(left), time(right));
    check("link count", left.nlink.to_string(), right.nlink.to_string());
    check("hard link to", optional(&left.hard_link), optional(&right.hard_link));
    check("device", optional(&left.rdev), optional(&right.rdev));
    check("target", optional(&left.target), optional(&right.target));
    check("content", optional(&left.sha256), optional(&right.sha256));
    let mut names: Vec<&String> = left.xattrs.keys().chain(right.xattrs.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let value = |entry: &Entry| optional(&entry.xattrs.get(name).cloned());
        check(&format!("xattr {name}"), value(left), value(right));
    }
}
