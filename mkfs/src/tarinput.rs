//! Reads one layer's tar into the tree and its file data into chunks.

use std::io::Read;

use crate::error::{EntryProblem, show};
use crate::layer::{Layer, Marker, MarkerFault, split_path};
use crate::pack::{DataError, Packer};
use crate::progress::Progress;
use crate::tar::{TarEntry, TarFault, TarKind, TarReader};
use crate::tree::{Body, Inode, Meta, Tree, device_number, make_xattrs};
use crate::{MkfsError, Options};

/// Reads the whole stream and merges the layer over the tree. `name` tells the layer in errors.
pub(crate) fn read_layer<R: Read>(
    stream: R,
    name: &str,
    tree: &mut Tree,
    packer: &mut Packer<'_>,
    options: &Options,
    progress: &dyn Progress,
) -> Result<(), MkfsError> {
    let fault = |fault| match fault {
        TarFault::Read { offset, source } => MkfsError::LayerRead { layer: name.to_owned(), offset, source },
        TarFault::Bad { offset, path, problem } => {
            MkfsError::Entry { layer: name.to_owned(), path, offset, problem }
        }
    };
    let mut reader = TarReader::new(stream);
    let mut layer = Layer::new(tree, options.follow_absolute_symlinks);
    while let Some(entry) = reader.next().map_err(fault)? {
        let (path, offset) = (show(&entry.path), entry.offset);
        add_entry(entry, &mut reader, &mut layer, tree, packer, options).map_err(|e| match e {
            Fault::Entry(problem) => MkfsError::Entry { layer: name.to_owned(), path, offset, problem },
            Fault::Data(DataError::Pack(error)) => error,
            Fault::Data(DataError::Read(source)) => {
                MkfsError::LayerRead { layer: name.to_owned(), offset: reader.offset(), source }
            }
            Fault::Data(DataError::Short) => MkfsError::LayerRead {
                layer: name.to_owned(),
                offset: reader.offset(),
                source: std::io::Error::new(
                    std::io::ErrorKind::UnexpectedEof,
                    format!("the tar ends in the data of \"{path}\""),
                ),
            },
        })?;
        progress.advance(0, 1);
    }
    reader.drain().map_err(fault)?;
    layer.merge(tree).map_err(|MarkerFault { offset, path, problem }| MkfsError::Entry {
        layer: name.to_owned(),
        path,
        offset,
        problem,
    })
}

enum Fault {
    Entry(EntryProblem),
    Data(DataError),
}

impl From<EntryProblem> for Fault {
    fn from(problem: EntryProblem) -> Self {
        Self::Entry(problem)
    }
}

impl From<DataError> for Fault {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

impl From<MkfsError> for Fault {
    fn from(error: MkfsError) -> Self {
        Self::Data(DataError::Pack(error))
    }
}

fn add_entry<R: Read>(
    entry: TarEntry,
    reader: &mut TarReader<R>,
    layer: &mut Layer,
    tree: &mut Tree,
    packer: &mut Packer<'_>,
    options: &Options,
) -> Result<(), Fault> {
    let path = split_path(&entry.path)?;
    if let Some((name, parents)) = path.split_last()
        && let Some(marker) = Marker::of(name)?
    {
        return Ok(layer.mark(tree, parents, marker, entry.offset)?);
    }
    if entry.kind == TarKind::HardLink {
        return Ok(layer.add_link(tree, &path, &entry.link)?);
    }
    let device = |(major, minor)| device_number(major, minor);
    let body = match entry.kind {
        TarKind::Directory => Body::Directory(Default::default()),
        TarKind::Symlink => Body::symlink(entry.link)?,
        TarKind::Char => Body::Char(device(entry.device)?),
        TarKind::Block => Body::Block(device(entry.device)?),
        TarKind::Fifo => Body::Fifo,
        TarKind::Regular | TarKind::HardLink => {
            let mut data = packer.file(entry.size)?;
            let mut at = 0;
            for extent in entry.extents {
                data.zeros(extent.start - at)?;
                data.read(reader, extent.len)?;
                at = extent.start + extent.len;
            }
            data.zeros(entry.size - at)?;
            Body::Regular { size: entry.size, data: data.finish()? }
        }
    };
    let meta = Meta {
        permissions: entry.permissions,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime.0,
        mtime_nsec: entry.mtime.1,
        xattrs: make_xattrs(entry.xattrs, options.unsupported_xattrs)?,
    };
    Ok(layer.add(tree, &path, Inode { meta, body })?)
}
