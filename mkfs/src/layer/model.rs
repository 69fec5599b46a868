//! Random layers against a naive model: a map of paths that is edited the way an unpacker edits a directory, markers
//! first, then entries one after the other.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Layer, Marker, split_path};
use crate::error::EntryProblem;
use crate::tree::{Body, Inode, Meta, Tree};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

#[derive(Clone, Debug)]
enum Op {
    /// An entry: path, kind, a stamp that tells entries of one path apart.
    Entry(Vec<String>, Kind, u32),
    Hide(Vec<String>, String),
    Opaque(Vec<String>),
}

type Model = BTreeMap<Vec<String>, (Kind, u32)>;

/// The stamp of directories that nothing describes.
const IMPLIED: u32 = 0;

fn remove(model: &mut Model, path: &[String]) {
    model.retain(|other, _| !other.starts_with(path));
}

fn apply(model: &mut Model, ops: &[Op]) -> Result<(), ()> {
    for op in ops {
        match op {
            Op::Hide(parents, name) => {
                remove(model, &[parents.as_slice(), std::slice::from_ref(name)].concat())
            }
            Op::Opaque(path) => {
                model.retain(|other, _| !(other.starts_with(path) && other.len() > path.len()))
            }
            Op::Entry(..) => {}
        }
    }
    for op in ops {
        let Op::Entry(path, kind, stamp) = op else { continue };
        for len in 1..path.len() {
            match model.entry(path[..len].to_vec()).or_insert((Kind::Directory, IMPLIED)) {
                (Kind::File, _) => return Err(()),
                (Kind::Directory, _) => {}
            }
        }
        let was_directory = model.get(path).is_some_and(|(old, _)| *old == Kind::Directory);
        if !(was_directory && *kind == Kind::Directory) {
            remove(model, path);
        }
        model.insert(path.clone(), (kind.clone(), *stamp));
    }
    Ok(())
}

fn bytes(path: &[String]) -> Vec<Vec<u8>> {
    split_path(path.join("/").as_bytes()).unwrap()
}

fn run(tree: &mut Tree, ops: &[Op]) -> Result<(), EntryProblem> {
    let mut layer = Layer::new(tree, false);
    for op in ops {
        match op {
            Op::Hide(parents, name) => {
                layer.mark(tree, &bytes(parents), Marker::Hide(name.as_bytes().to_vec()), 0)?;
            }
            Op::Opaque(path) => layer.mark(tree, &bytes(path), Marker::Opaque, 0)?,
            Op::Entry(path, kind, stamp) => {
                let body = match kind {
                    Kind::Directory => Body::Directory(BTreeMap::new()),
                    Kind::File => Body::Fifo,
                };
                let meta = Meta { uid: *stamp, ..Meta::implied_directory() };
                layer.add(tree, &bytes(path), Inode { meta, body })?;
            }
        }
    }
    layer.merge(tree).map_err(|fault| fault.problem)
}

fn flatten(tree: &Tree) -> Model {
    let mut model = Model::new();
    let mut todo = vec![(Vec::new(), tree.root())];
    while let Some((path, id)) = todo.pop() {
        for (name, &child) in tree.children(id).unwrap() {
            let mut path: Vec<String> = path.clone();
            path.push(String::from_utf8(name.clone()).unwrap());
            let is_directory = tree.children(child).is_some();
            let kind = if is_directory { Kind::Directory } else { Kind::File };
            model.insert(path.clone(), (kind, tree.get(child).meta.uid));
            if is_directory {
                todo.push((path, child));
            }
        }
    }
    model
}

fn name() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "c"]).prop_map(str::to_owned)
}

fn op() -> impl Strategy<Value = Op> {
    let path = |min| prop::collection::vec(name(), min..4);
    prop_oneof![
        4 => (path(1), any::<bool>(), 1u32..1000).prop_map(|(path, is_directory, stamp)| {
            Op::Entry(path, if is_directory { Kind::Directory } else { Kind::File }, stamp)
        }),
        1 => (path(0), name()).prop_map(|(parents, name)| Op::Hide(parents, name)),
        1 => path(0).prop_map(Op::Opaque),
    ]
}

fn is_entry(op: &Op) -> bool {
    matches!(op, Op::Entry(..))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_merge_as_an_unpacker_would(layers in prop::collection::vec(prop::collection::vec(op(), 0..8), 1..5)) {
        let mut tree = Tree::new();
        let mut model = Model::new();
        for mut ops in layers {
            ops.sort_by_key(is_entry);
            let expected = apply(&mut model, &ops);
            let got = run(&mut tree, &ops);
            prop_assert_eq!(expected.is_ok(), got.is_ok(), "{:?}", got);
            if expected.is_err() {
                return Ok(());
            }
            prop_assert_eq!(flatten(&tree), model.clone());
        }
    }

    #[test]
    fn the_place_of_markers_in_a_layer_does_not_matter(
        lower in prop::collection::vec(op(), 0..8),
        upper in prop::collection::vec(op(), 0..8),
    ) {
        let mut trees = [Tree::new(), Tree::new()];
        for tree in &mut trees {
            prop_assume!(run(tree, &lower).is_ok());
        }
        let mut sorted = upper.clone();
        sorted.sort_by_key(is_entry);
        // A marker that comes late cannot take back the error about a parent that is a file.
        if run(&mut trees[0], &upper).is_ok() {
            prop_assert!(run(&mut trees[1], &sorted).is_ok());
            prop_assert_eq!(flatten(&trees[0]), flatten(&trees[1]));
        }
    }
}
