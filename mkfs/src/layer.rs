//! One layer over the layers below it: where its entries go, what its markers hide, how it is merged.
//!
//! A layer's entries are collected in a tree of their own, and its markers are applied to the tree below when the layer
//! is complete, so that it does not matter where in the tar they stand. Lookups (parents that are symlinks, targets of
//! hard links) see the layer as read so far first, then the tree below it less what markers read so far hide.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use crate::error::{EntryProblem, show};
use crate::tree::{Body, Inode, InodeId, Meta, Tree, check_name};

/// Symlinks followed on the way to an entry's parent (the kernel's limit).
const SYMLINKS_MAX: usize = 40;
/// Longest path of an entry (`PATH_MAX` without the NUL).
const PATH_MAX: usize = 4095;

/// Cuts a path into names. `.` and empty names vanish, `..` takes back a name. Absolute paths start at the root.
pub(crate) fn split_path(path: &[u8]) -> Result<Vec<Vec<u8>>, EntryProblem> {
    if path.len() > PATH_MAX {
        let found = u64::try_from(path.len()).unwrap_or(u64::MAX);
        return Err(EntryProblem::TooLarge { what: "the length of the path", found, limit: 4095 });
    }
    let mut names: Vec<Vec<u8>> = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop().ok_or(EntryProblem::LeavesRoot)?),
            name => {
                check_name(name)?;
                names.push(name.to_vec());
            }
        }
    }
    Ok(names)
}

#[derive(Default)]
struct Marks {
    opaque: bool,
    hidden: BTreeSet<Vec<u8>>,
}

/// What a name is to a layer: an entry, or a marker about the layers below.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    /// `.wh..wh..opq`: the directory hides all of its lower content.
    Opaque,
    /// `.wh.NAME`: NAME of the layers below is gone.
    Hide(Vec<u8>),
    /// Other names that begin with `.wh..wh.`: book-keeping of aufs, not content.
    Ignore,
}

impl Marker {
    /// The marker that a file name stands for.
    pub(crate) fn of(name: &[u8]) -> Result<Option<Self>, EntryProblem> {
        let Some(hidden) = name.strip_prefix(b".wh.") else { return Ok(None) };
        if hidden == b".wh..opq" {
            return Ok(Some(Self::Opaque));
        }
        if hidden.starts_with(b".wh.") {
            return Ok(Some(Self::Ignore));
        }
        match hidden {
            b"" | b"." | b".." => Err(EntryProblem::BadWhiteout),
            name => Ok(Some(Self::Hide(name.to_vec()))),
        }
    }
}

/// A directory on the way to an entry, in the layer's own tree and in the tree below it.
#[derive(Clone, Copy)]
struct Place {
    own: Option<InodeId>,
    lower: Option<InodeId>,
}

/// What a lookup of one name found.
enum Found {
    Own(InodeId),
    Lower(InodeId),
}

/// A marker, kept until the layer is complete.
struct Pending {
    /// Offset in the tar, for errors.
    offset: u64,
    parents: Vec<Vec<u8>>,
    marker: Marker,
}

/// A marker whose directory cannot be told.
#[derive(Debug)]
pub(crate) struct MarkerFault {
    pub(crate) offset: u64,
    /// The directory.
    pub(crate) path: String,
    pub(crate) problem: EntryProblem,
}

/// A layer being read.
pub(crate) struct Layer {
    root: InodeId,
    markers: Vec<Pending>,
    /// What markers hide, by directory of the tree below.
    marks: HashMap<InodeId, Marks>,
    /// Directories that no entry describes: they take everything from the directory below them.
    implied: HashSet<InodeId>,
    /// Directories that took the place of a file of this layer: they do not merge with what is below.
    fresh: HashSet<InodeId>,
    follow_absolute: bool,
}

impl Layer {
    pub(crate) fn new(tree: &mut Tree, follow_absolute: bool) -> Self {
        let root = tree.add(implied_directory());
        Self {
            root,
            markers: Vec::new(),
            marks: HashMap::new(),
            implied: HashSet::from([root]),
            fresh: HashSet::new(),
            follow_absolute,
        }
    }

    fn lookup(&self, tree: &Tree, place: Place, name: &[u8]) -> Option<Found> {
        let own = place.own.and_then(|dir| tree.child(dir, name)).map(Found::Own);
        own.or_else(|| self.lookup_below(tree, place, name).map(Found::Lower))
    }

    fn lookup_below(&self, tree: &Tree, place: Place, name: &[u8]) -> Option<InodeId> {
        let lower = place.lower?;
        let is_hidden = |marks: &Marks| marks.opaque || marks.hidden.contains(name);
        if self.marks.get(&lower).is_some_and(is_hidden) {
            return None;
        }
        tree.child(lower, name)
    }

    /// The directory that the names lead to, symlinks followed: the real names from the root, and the place.
    fn resolve(&self, tree: &Tree, names: &[Vec<u8>]) -> Result<(Vec<Vec<u8>>, Place), EntryProblem> {
        let root = Place { own: Some(self.root), lower: Some(tree.root()) };
        let mut way: Vec<(Vec<u8>, Place)> = Vec::new();
        let mut todo: VecDeque<Vec<u8>> = names.iter().cloned().collect();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    way.pop().ok_or(EntryProblem::LeavesRoot)?;
                    continue;
                }
                _ => check_name(&name)?,
            }
            let place = way.last().map_or(root, |(_, place)| *place);
            let found = self.lookup(tree, place, &name);
            let id = match found {
                None => {
                    way.push((name, Place { own: None, lower: None }));
                    continue;
                }
                Some(Found::Own(id) | Found::Lower(id)) => id,
            };
            match (&tree.get(id).body, found) {
                (Body::Directory(_), Some(Found::Own(own))) => {
                    // The lower directory of that name shows through unless the layer hides it.
                    let lower = self.lookup_below(tree, place, &name);
                    let lower = lower.filter(|&id| tree.children(id).is_some() && !self.fresh.contains(&own));
                    way.push((name, Place { own: Some(own), lower }));
                }
                (Body::Directory(_), _) => way.push((name, Place { own: None, lower: Some(id) })),
                (Body::Symlink(target), _) => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Err(EntryProblem::TooManySymlinks(SYMLINKS_MAX));
                    }
                    if target.starts_with(b"/") {
                        if !self.follow_absolute {
                            let link = join(way.iter().map(|(name, _)| name).chain([&name]));
                            return Err(EntryProblem::AbsoluteSymlink { link, target: show(target) });
                        }
                        way.clear();
                    }
                    for part in target.rsplit(|&byte| byte == b'/') {
                        todo.push_front(part.to_vec());
                    }
                }
                _ => {
                    let parent = join(way.iter().map(|(name, _)| name).chain([&name]));
                    return Err(EntryProblem::ParentNotDirectory(parent));
                }
            }
        }
        let place = way.last().map_or(root, |(_, place)| *place);
        Ok((way.into_iter().map(|(name, _)| name).collect(), place))
    }

    /// The layer's own directory for the names, made where it is missing.
    fn directory(&mut self, tree: &mut Tree, names: &[Vec<u8>]) -> Result<InodeId, EntryProblem> {
        let (real, place) = self.resolve(tree, names)?;
        if let Some(own) = place.own {
            return Ok(own);
        }
        let mut dir = self.root;
        for name in real {
            dir = match tree.child(dir, &name) {
                Some(child) => child,
                None => {
                    let child = tree.add(implied_directory());
                    self.implied.insert(child);
                    self.link(tree, dir, name, child);
                    child
                }
            };
        }
        Ok(dir)
    }

    fn link(&mut self, tree: &mut Tree, dir: InodeId, name: Vec<u8>, child: InodeId) {
        let names = tree.children_mut(dir).expect("resolve gives directories only");
        names.insert(name, child);
    }

    /// Adds an entry; one of the same path that came before is replaced, a directory keeps its content.
    pub(crate) fn add(
        &mut self,
        tree: &mut Tree,
        path: &[Vec<u8>],
        inode: Inode,
    ) -> Result<(), EntryProblem> {
        let is_directory = matches!(inode.body, Body::Directory(_));
        let Some((name, parents)) = path.split_last() else {
            if !is_directory {
                return Err(EntryProblem::RootNotDirectory);
            }
            self.implied.remove(&self.root);
            tree.get_mut(self.root).meta = inode.meta;
            return Ok(());
        };
        let dir = self.directory(tree, parents)?;
        let old = tree.child(dir, name);
        if is_directory
            && let Some(old) = old
            && tree.children(old).is_some()
        {
            self.implied.remove(&old);
            tree.get_mut(old).meta = inode.meta;
            return Ok(());
        }
        let id = tree.add(inode);
        if is_directory && old.is_some() {
            // The file that this directory replaces has hidden whatever a lower layer has there.
            self.fresh.insert(id);
        }
        self.link(tree, dir, name.clone(), id);
        Ok(())
    }

    /// Adds a hard link. Regular files share one inode; a link to any other kind becomes a file of its own.
    pub(crate) fn add_link(
        &mut self,
        tree: &mut Tree,
        path: &[Vec<u8>],
        target: &[u8],
    ) -> Result<(), EntryProblem> {
        let outside = || EntryProblem::LinkTargetOutside(show(target));
        let names = split_path(target).map_err(|e| match e {
            EntryProblem::LeavesRoot => outside(),
            other => other,
        })?;
        let Some((name, parents)) = names.split_last() else {
            return Err(EntryProblem::LinkTargetDirectory(show(target)));
        };
        let (_, place) = self.resolve(tree, parents).map_err(|e| match e {
            EntryProblem::LeavesRoot => outside(),
            other => other,
        })?;
        let id = match self.lookup(tree, place, name) {
            Some(Found::Own(id) | Found::Lower(id)) => id,
            None => return Err(EntryProblem::LinkTargetMissing(show(target))),
        };
        let (link_name, link_parents) = path.split_last().ok_or(EntryProblem::RootNotDirectory)?;
        let dir = self.directory(tree, link_parents)?;
        let id = match &tree.get(id).body {
            Body::Directory(_) => return Err(EntryProblem::LinkTargetDirectory(show(target))),
            Body::Regular { .. } => id,
            _ => {
                let copy = tree.get(id).clone();
                tree.add(copy)
            }
        };
        self.link(tree, dir, link_name.clone(), id);
        Ok(())
    }

    /// Takes note of a marker in the directory that `parents` leads to. `offset` is given back in errors.
    pub(crate) fn mark(
        &mut self,
        tree: &Tree,
        parents: &[Vec<u8>],
        marker: Marker,
        offset: u64,
    ) -> Result<(), EntryProblem> {
        if marker == Marker::Ignore {
            return Ok(());
        }
        self.apply_mark(tree, parents, &marker)?;
        self.markers.push(Pending { offset, parents: parents.to_vec(), marker });
        Ok(())
    }

    fn apply_mark(&mut self, tree: &Tree, parents: &[Vec<u8>], marker: &Marker) -> Result<(), EntryProblem> {
        let lower = match self.resolve(tree, parents) {
            Ok((_, place)) => place.lower,
            // Nothing below a file needs hiding.
            Err(EntryProblem::ParentNotDirectory(_)) => None,
            Err(problem) => return Err(problem),
        };
        let Some(lower) = lower else { return Ok(()) };
        let marks = self.marks.entry(lower).or_default();
        match marker {
            Marker::Opaque => marks.opaque = true,
            Marker::Hide(name) => drop(marks.hidden.insert(name.clone())),
            Marker::Ignore => {}
        }
        Ok(())
    }

    /// Puts the layer over the tree below it: markers first, then entries.
    pub(crate) fn merge(mut self, tree: &mut Tree) -> Result<(), MarkerFault> {
        // Once more, now that all of the layer's own directories are known: one of them may stand where a marker read
        // earlier went through a symlink of a lower layer.
        let mut marks: HashMap<InodeId, Marks> = HashMap::new();
        for Pending { offset, parents, marker } in std::mem::take(&mut self.markers) {
            // Each on its own: what one marker hides must not change where another one is.
            self.marks.clear();
            self.apply_mark(tree, &parents, &marker).map_err(|problem| MarkerFault {
                offset,
                path: join(parents.iter()),
                problem,
            })?;
            for (dir, new) in self.marks.drain() {
                let all = marks.entry(dir).or_default();
                all.opaque |= new.opaque;
                all.hidden.extend(new.hidden);
            }
        }
        for (dir, Marks { opaque, hidden }) in marks {
            let Some(children) = tree.children_mut(dir) else { continue };
            if opaque {
                children.clear();
            }
            for name in hidden {
                children.remove(&name);
            }
        }
        let mut todo = vec![(tree.root(), self.root)];
        while let Some((lower, upper)) = todo.pop() {
            let names = std::mem::take(tree.children_mut(upper).expect("only directories are merged"));
            if !self.implied.contains(&upper) {
                let meta = tree.get(upper).meta.clone();
                tree.get_mut(lower).meta = meta;
            }
            for (name, id) in names {
                let below = tree.child(lower, &name).filter(|&below| tree.children(below).is_some());
                match below {
                    Some(below) if tree.children(id).is_some() && !self.fresh.contains(&id) => {
                        todo.push((below, id));
                    }
                    _ => {
                        let children = tree.children_mut(lower).expect("only directories are merged");
                        children.insert(name, id);
                    }
                }
            }
        }
        Ok(())
    }
}

fn implied_directory() -> Inode {
    Inode { meta: Meta::implied_directory(), body: Body::Directory(BTreeMap::new()) }
}

fn join<'a>(names: impl Iterator<Item = &'a Vec<u8>>) -> String {
    let names: Vec<&[u8]> = names.map(Vec::as_slice).collect();
    show(&names.join(&b'/'))
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(body: Body, permissions: u16) -> Inode {
        Inode { meta: Meta { permissions, ..Meta::implied_directory() }, body }
    }

    fn dir() -> Inode {
        inode(Body::Directory(BTreeMap::new()), 0o700)
    }

    /// A layer from short words: "path/" directory, "path" fifo, "path->target" symlink, "path=target" hard link,
    /// markers as their names.
    fn add(layer: &mut Layer, tree: &mut Tree, entry: &str) -> Result<(), EntryProblem> {
        if let Some((path, target)) = entry.split_once("->") {
            let body = Body::symlink(target.as_bytes().to_vec())?;
            return layer.add(tree, &split_path(path.as_bytes())?, inode(body, 0o777));
        }
        if let Some((path, target)) = entry.split_once('=') {
            return layer.add_link(tree, &split_path(path.as_bytes())?, target.as_bytes());
        }
        let path = split_path(entry.as_bytes())?;
        if let Some((name, parents)) = path.split_last()
            && let Some(marker) = Marker::of(name)?
        {
            return layer.mark(tree, parents, marker, 0);
        }
        layer.add(tree, &path, if entry.ends_with('/') { dir() } else { inode(Body::Fifo, 0o600) })
    }

    fn list(tree: &Tree) -> Vec<String> {
        let mut out = Vec::new();
        let mut todo = vec![(String::new(), tree.root())];
        while let Some((path, id)) = todo.pop() {
            for (name, &child) in tree.children(id).unwrap() {
                let path = format!("{path}{}", String::from_utf8_lossy(name));
                if tree.children(child).is_some() {
                    out.push(format!("{path}/"));
                    todo.push((format!("{path}/"), child));
                } else {
                    out.push(path);
                }
            }
        }
        out.sort();
        out
    }

    fn build(layers: &[&[&str]]) -> Result<Tree, EntryProblem> {
        let mut tree = Tree::new();
        for entries in layers {
            let mut layer = Layer::new(&mut tree, false);
            for entry in *entries {
                add(&mut layer, &mut tree, entry)?;
            }
            layer.merge(&mut tree).unwrap();
        }
        Ok(tree)
    }

    #[test]
    fn paths() {
        assert_eq!(split_path(b"./a//b/.").unwrap(), [b"a".to_vec(), b"b".to_vec()]);
        assert_eq!(split_path(b"/a/../b").unwrap(), [b"b".to_vec()]);
        assert!(split_path(b"./").unwrap().is_empty());
        assert!(matches!(split_path(b"a/../../b"), Err(EntryProblem::LeavesRoot)));
        assert!(matches!(split_path(&[b'a'; 256]), Err(EntryProblem::BadName(_))));
        assert!(split_path(&[b'a'; 255]).is_ok());
        assert!(split_path(&b"a/".repeat(2048)).is_err());
    }

    #[test]
    fn whiteouts_act_below_only_wherever_they_stand() {
        let lower: &[&str] = &["d/", "d/x", "d/y", "e"];
        for upper in [["d/.wh.x", "d/x", ".wh.e"], ["d/x", ".wh.e", "d/.wh.x"]] {
            assert_eq!(list(&build(&[lower, &upper]).unwrap()), ["d/", "d/x", "d/y"]);
        }
        for upper in [["d/.wh..wh..opq", "d/z"], ["d/z", "d/.wh..wh..opq"]] {
            assert_eq!(list(&build(&[lower, &upper]).unwrap()), ["d/", "d/z", "e"]);
        }
        // A directory that is hidden and made again starts empty.
        assert_eq!(list(&build(&[lower, &["d/", "d/n", ".wh.d"]]).unwrap()), ["d/", "d/n", "e"]);
    }

    #[test]
    fn markers_never_show() {
        let tree =
            build(&[&["a/.wh.b", "a/.wh..wh..opq", ".wh.c", ".wh..wh.plnk", ".wh..wh.aufs", "a/x"]]).unwrap();
        assert_eq!(list(&tree), ["a/", "a/x"]);
        assert!(matches!(build(&[&["a/.wh."]]), Err(EntryProblem::BadWhiteout)));
        assert!(matches!(build(&[&["a/.wh..."]]), Err(EntryProblem::BadWhiteout)));
    }

    #[test]
    fn a_marker_read_early_means_the_layers_own_directory() {
        let lower: &[&str] = &["usr/lib/", "usr/lib/x", "lib->usr/lib"];
        for upper in [["lib/.wh..wh..opq", "lib/"], ["lib/", "lib/.wh..wh..opq"]] {
            assert_eq!(list(&build(&[lower, &upper]).unwrap()), ["lib/", "usr/", "usr/lib/", "usr/lib/x"]);
        }
        assert_eq!(list(&build(&[lower, &["lib/.wh.x"]]).unwrap()), ["lib", "usr/", "usr/lib/"]);
    }

    #[test]
    fn kinds_replace_each_other_and_directories_merge() {
        let tree = build(&[&["d/", "d/x", "f"], &["d", "f/", "f/y"]]).unwrap();
        assert_eq!(list(&tree), ["d", "f/", "f/y"]);
        let tree = build(&[&["d/", "d/x"], &["d/y"]]).unwrap();
        assert_eq!(list(&tree), ["d/", "d/x", "d/y"]);
        // The implied directory of the upper layer does not change the lower one; a described one does.
        let mode = |tree: &Tree| tree.get(tree.child(tree.root(), b"d").unwrap()).meta.permissions;
        assert_eq!(mode(&tree), 0o700);
        assert_eq!(mode(&build(&[&["d/x"]]).unwrap()), 0o755);
        assert_eq!(mode(&build(&[&["d/x"], &["d/"]]).unwrap()), 0o700);
    }

    #[test]
    fn last_entry_of_a_path_wins() {
        let tree = build(&[&["a/", "a/x", "a->b", "b", "b/", "b/y", "b/"]]).unwrap();
        assert_eq!(list(&tree), ["a", "b/", "b/y"]);
    }

    #[test]
    fn parents_that_are_symlinks() {
        let tree = build(&[&["usr/lib/", "lib->usr/lib"], &["lib/x", "lib/sub/../z"]]).unwrap();
        assert_eq!(list(&tree), ["lib", "usr/", "usr/lib/", "usr/lib/x", "usr/lib/z"]);
        let out = build(&[&["out->../..", "out/x"]]);
        assert!(matches!(out, Err(EntryProblem::LeavesRoot)));
        let absolute = build(&[&["out->/etc"], &["out/x"]]);
        assert!(matches!(absolute, Err(EntryProblem::AbsoluteSymlink { .. })));
        assert!(matches!(build(&[&["a->b", "b->a", "a/x"]]), Err(EntryProblem::TooManySymlinks(_))));
        assert!(matches!(build(&[&["f"], &["f/x"]]), Err(EntryProblem::ParentNotDirectory(_))));
        let mut tree = Tree::new();
        let mut layer = Layer::new(&mut tree, true);
        for entry in ["run/", "var/run->/run", "var/run/pid"] {
            add(&mut layer, &mut tree, entry).unwrap();
        }
        layer.merge(&mut tree).unwrap();
        assert_eq!(list(&tree), ["run/", "run/pid", "var/", "var/run"]);
    }

    #[test]
    fn hard_links() {
        let mut tree = Tree::new();
        let mut layer = Layer::new(&mut tree, false);
        let data = crate::pack::DataId::new(0);
        layer.add(&mut tree, &[b"a".to_vec()], inode(Body::Regular { size: 0, data }, 0o644)).unwrap();
        add(&mut layer, &mut tree, "d/b=./a").unwrap();
        layer.merge(&mut tree).unwrap();
        let mut layer = Layer::new(&mut tree, false);
        for entry in ["c=/d/b", ".wh.a", "fifo", "fifo2=fifo"] {
            add(&mut layer, &mut tree, entry).unwrap();
        }
        for (bad, expected) in [
            ("x=nothing", "neither this layer"),
            ("x=../a", "leaves the root"),
            ("x=d", "directory"),
            ("x=", "directory"),
        ] {
            let error = add(&mut layer, &mut tree, bad).unwrap_err().to_string();
            assert!(error.contains(expected), "{bad}: {error}");
        }
        layer.merge(&mut tree).unwrap();
        assert_eq!(list(&tree), ["c", "d/", "d/b", "fifo", "fifo2"]);
        let root = tree.root();
        let d = tree.child(root, b"d").unwrap();
        assert_eq!(tree.child(root, b"c"), tree.child(d, b"b"));
        assert_ne!(tree.child(root, b"fifo"), tree.child(root, b"fifo2"));
    }

    #[test]
    fn root_is_a_directory() {
        let tree = build(&[&["./"]]).unwrap();
        assert_eq!(tree.get(tree.root()).meta.permissions, 0o700);
        assert!(matches!(build(&[&["."], &[]]), Err(EntryProblem::RootNotDirectory)));
    }
}
