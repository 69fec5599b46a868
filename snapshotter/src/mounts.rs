//! What containerd has to mount to get a snapshot's files.

use crate::error::Kind as ErrorKind;
use crate::labels::{self, GIDS, Layer, UIDS};
use crate::snapshot::{Content, Kind, Snapshot};
use crate::table::Table;
use crate::{Error, api};

/// The mounts of an active snapshot or a view.
///
/// # Errors
/// When it is committed, or something it stands on is missing.
pub(crate) fn of(table: &Table, key: &str) -> Result<Vec<api::Mount>, Error> {
    let chain = table.chain(key)?;
    let Some((top, below)) = chain.split_first() else { return Err(Error::not_found(key)) };
    if top.kind == Kind::Committed {
        let message = format!("snapshot {key} is committed: prepare one on top of it");
        return Err(Error::new(ErrorKind::FailedPrecondition, message));
    }
    let (mut lower, mut bare) = (Vec::new(), None);
    for snapshot in below {
        let dir = table.dir(snapshot.id);
        match &snapshot.content {
            Content::Files => lower.push(text(&Snapshot::files(&dir))?),
            Content::Blob { .. } => bare = Some(snapshot),
            Content::Image { .. } => {
                lower.push(text(&Snapshot::image(&dir))?);
                // It has the files of all below it.
                break;
            }
        }
    }
    // The bootstrap's own layer is unpacked on top of them. Anything else would be without their files: one image can say
    // of another one's layer that it is such data.
    if let Some(bare) = bare
        && !matches!(labels::layer(&top.labels), Layer::Bootstrap(_))
    {
        let message =
            format!("snapshot {key} stands on data of an image without its bootstrap ({})", bare.key);
        return Err(Error::new(ErrorKind::FailedPrecondition, message));
    }
    let own = table.dir(top.id);
    let files = text(&Snapshot::files(&own))?;
    let mount = match (top.kind, lower.as_slice()) {
        (Kind::Active, []) => bind(files, "rw"),
        (_, []) => bind(files, "ro"),
        (Kind::View, [only]) if !is_mapped(top) => bind(only.clone(), "ro"),
        (kind, lower) => {
            let mut options = vec!["index=off".to_owned()];
            if kind == Kind::Active {
                options.push(format!("workdir={}", text(&Snapshot::work(&own))?));
                options.push(format!("upperdir={files}"));
            }
            if kind == Kind::View && lower.len() == 1 {
                // overlayfs wants two directories when none of them is writable.
                options.push(format!("lowerdir={files}:{}", lower.join(":")));
            } else {
                options.push(format!("lowerdir={}", lower.join(":")));
            }
            // containerd maps the owners of the lower directories by these.
            for (name, label) in [("uidmap", UIDS), ("gidmap", GIDS)] {
                if let Some(map) = top.labels.get(label) {
                    options.push(format!("{name}={map}"));
                }
            }
            api::Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }
        }
    };
    Ok(vec![mount])
}

fn is_mapped(snapshot: &Snapshot) -> bool {
    snapshot.labels.contains_key(UIDS) || snapshot.labels.contains_key(GIDS)
}

fn bind(source: String, access: &str) -> api::Mount {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    api::Mount { r#type: "bind".into(), source, target: String::new(), options }
}

fn text(path: &std::path::Path) -> Result<String, Error> {
    let text = path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Internal, format!("{}: the path is not text", path.display()))
    })?;
    Ok(text.to_owned())
}
