//! The files whose mark the keeper holds.

use crate::lease::WriteLease;
use crate::protocol::{Errno, FileId, Fill, Label};
use crate::server::kept;
use crate::server::ledger::{FILES_MAX, FileRecord, Ledger};
use crate::server::log::log;
use crate::server::present::Present;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno as Sys;
use skimmer_fanotify::Group;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

/// How many inodes are remembered as complete after their mark went.
const REMEMBERED: usize = 4096;

/// Device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Inode(u64, u64);

impl Inode {
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Result<(Self, rustix::fs::Stat), Sys> {
        let stat = rustix::fs::fstat(fd)?;
        Ok((Self(stat.st_dev, stat.st_ino), stat))
    }
}

/// One watched file.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) label: Label,
    pub(crate) writer: OwnedFd,
    inode: Inode,
    present: Present,
    /// Accesses in the event table.
    pending: u32,
    /// Complete and unmarked; goes when its last access is answered.
    draining: bool,
    /// Of the ledger.
    slot: usize,
}

impl Watched {
    fn record(&self, file: FileId) -> FileRecord {
        FileRecord {
            file,
            label: self.label,
            inode: [self.inode.0, self.inode.1],
            writer: self.writer.as_raw_fd(),
            draining: self.draining,
            mapped: self.present.mapped(),
        }
    }
}

/// What to do with an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ask the daemon.
    Relay(FileId),
    /// Every byte is there: let it go on.
    Allow,
    /// Nobody can serve it.
    Deny,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Files {
    by_id: HashMap<FileId, Watched>,
    by_inode: HashMap<Inode, FileId>,
    /// Inodes unmarked as complete: accesses that the kernel had queued before the mark went may still come.
    complete: Box<[Option<Inode>]>,
    next_complete: usize,
    max: usize,
    ledger: Rc<Ledger>,
    /// Slots of the ledger below `next_slot` that are free.
    free_slots: Vec<usize>,
    next_slot: usize,
}

impl Files {
    pub(crate) fn new(max: usize, ledger: Rc<Ledger>) -> Self {
        let max = max.min(FILES_MAX);
        Self {
            ledger,
            free_slots: Vec::new(),
            next_slot: 0,
            by_id: HashMap::with_capacity(max.min(REMEMBERED)),
            by_inode: HashMap::with_capacity(max.min(REMEMBERED)),
            complete: vec![None; REMEMBERED].into(),
            next_complete: 0,
            max,
        }
    }

    /// Files that another process watched, as it wrote them down; `adopt` gives the descriptor of a number. Their marks
    /// are set once more: the other may have ended between removing one and writing that down.
    pub(crate) fn resume(
        max: usize,
        ledger: Rc<Ledger>,
        group: Option<&Group>,
        mut adopt: impl FnMut(RawFd) -> Option<OwnedFd>,
    ) -> Result<Self, Sys> {
        let mut files = Self::new(max, Rc::clone(&ledger));
        files.next_slot =
            usize::try_from(ledger.header().files).map_or(FILES_MAX, |files| files.min(FILES_MAX));
        for slot in 0..files.next_slot {
            let Some(record) = ledger.file(slot)? else {
                files.free_slots.push(slot);
                continue;
            };
            let inode = Inode(record.inode[0], record.inode[1]);
            let is_same = |fd: &OwnedFd| Inode::of(fd.as_fd()).is_ok_and(|(found, _)| found == inode);
            let Some(writer) = adopt(record.writer).filter(is_same) else {
                log!(
                    "{}: its descriptor {} is lost; it is not watched any more",
                    record.label,
                    record.writer
                );
                files.free_slots.push(slot);
                kept::forget(record.writer);
                ledger.clear_file(slot);
                continue;
            };
            if let (Some(group), false) = (group, record.draining)
                && let Err(error) = group.mark(&writer)
            {
                log!("{}: {error}", record.label);
            }
            let mut present = Present::new(record.mapped, files.mapped());
            ledger.map(slot, present.words())?;
            let FileRecord { file, label, draining, .. } = record;
            files.by_inode.insert(inode, file);
            let watched = Watched { label, writer, inode, present, pending: 0, draining, slot };
            files.by_id.insert(file, watched);
        }
        for (index, entry) in files.complete.iter_mut().enumerate() {
            *entry = ledger.complete(index)?.map(|[device, inode]| Inode(device, inode));
        }
        Ok(files)
    }

    /// Whose accesses come with descriptors of this inode.
    pub(crate) fn of_inode(&self, inode: Inode) -> Option<FileId> {
        self.by_inode.get(&inode).copied()
    }

    /// Lets go of complete files that nothing waits for.
    pub(crate) fn forget_all_drained(&mut self) {
        for file in self.draining() {
            self.forget_drained(file);
        }
    }

    fn mapped(&self) -> u64 {
        self.by_id.values().map(|watched| watched.present.mapped()).sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn get(&self, file: FileId) -> Option<&Watched> {
        self.by_id.get(&file)
    }

    /// Names of the files that a daemon has to know.
    pub(crate) fn names(&self) -> Vec<FileId> {
        let marked = self.by_id.iter().filter(|(_, watched)| !watched.draining);
        let mut names: Vec<FileId> = marked.map(|(&file, _)| file).collect();
        names.sort_unstable();
        names
    }

    /// Marks a file. Watching the same file under the same name again changes nothing.
    pub(crate) fn watch(
        &mut self,
        group: &Group,
        file: FileId,
        label: Label,
        writer: OwnedFd,
    ) -> Result<(), Errno> {
        let (inode, stat) = Inode::of(writer.as_fd())?;
        let mode = rustix::fs::fcntl_getfl(&writer)? & OFlags::RWMODE;
        if !FileType::from_raw_mode(stat.st_mode).is_file() || mode == OFlags::RDONLY {
            return Err(Sys::BADF.into());
        }
        match (self.by_id.get(&file), self.by_inode.get(&inode)) {
            (None, None) => {}
            (Some(known), _) if known.inode == inode && !known.draining => return Ok(()),
            _ => return Err(Sys::EXIST.into()),
        }
        if self.by_id.len() >= self.max {
            return Err(Sys::MFILE.into());
        }
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.next_slot += 1;
            self.ledger.update(|header| header.files = u32::try_from(self.next_slot).unwrap_or(u32::MAX));
            self.next_slot - 1
        });
        // What was filled in the slot's last file is not in this one.
        let cleared = self.ledger.clear_map(slot).map_err(Errno::from);
        let marked = cleared.and_then(|()| {
            group.mark(&writer).map_err(|error| Errno::new(error.raw_os_error()).unwrap_or(Errno::IO))
        });
        if let Err(errno) = marked {
            self.free_slots.push(slot);
            return Err(errno);
        }
        // What was said of this inode's last life is no longer true.
        for (index, entry) in self.complete.iter_mut().enumerate() {
            if entry.take_if(|known| *known == inode).is_some() {
                self.ledger.set_complete(index, [0, 0]);
            }
        }
        let present = Present::new(u64::try_from(stat.st_size).unwrap_or(0), self.mapped());
        let watched = Watched { label, writer, inode, present, pending: 0, draining: false, slot };
        // Behind the mark: without it nobody may take the file for watched.
        self.ledger.set_file(slot, &watched.record(file));
        kept::keep(watched.writer.as_fd());
        self.by_inode.insert(inode, file);
        self.by_id.insert(file, watched);
        Ok(())
    }

    /// Removes the mark. An incomplete file must be open nowhere else, or its readers would get zeros.
    pub(crate) fn unwatch(&mut self, group: &Group, file: FileId, complete: bool) -> Result<(), Errno> {
        let watched = self.by_id.get_mut(&file).filter(|watched| !watched.draining).ok_or(Sys::NOENT)?;
        let inode = watched.inode;
        if complete {
            unmark(group, watched)?;
            watched.draining = true;
            self.ledger.set_file(watched.slot, &watched.record(file));
            self.ledger.set_complete(self.next_complete, [inode.0, inode.1]);
            self.complete[self.next_complete] = Some(inode);
            self.next_complete = (self.next_complete + 1) % self.complete.len();
            self.forget_drained(file);
            return Ok(());
        }
        if watched.pending > 0 {
            return Err(Sys::BUSY.into());
        }
        let lease = WriteLease::take(watched.writer.as_fd());
        let lease = lease.map_err(|error| error.raw_os_error().and_then(Errno::new).unwrap_or(Errno::IO))?;
        if lease.is_none() {
            return Err(Sys::BUSY.into());
        }
        unmark(group, watched)?;
        drop(lease);
        self.remove(file);
        Ok(())
    }

    /// What the daemon says of these bytes. What is not durable is not written down: it ends with the daemon, who would
    /// hear of a disk that fails, or with this process.
    pub(crate) fn fill(&mut self, file: FileId, offset: u64, count: u64, fill: Fill) {
        let Some(watched) = self.by_id.get_mut(&file) else { return };
        let pages = match fill {
            Fill::Absent => watched.present.remove(offset, count),
            Fill::Written | Fill::Durable => watched.present.insert(offset, count),
        };
        if fill != Fill::Written {
            self.ledger.set_map(watched.slot, &pages, fill == Fill::Durable);
        }
    }

    /// The daemon is gone: only what is durable is still filled.
    pub(crate) fn only_durable(&mut self) {
        for watched in self.by_id.values_mut() {
            let words = watched.present.words();
            if let Err(errno) = self.ledger.map(watched.slot, words) {
                log!("{}: what is filled is not known any more: {errno}", watched.label);
                words.fill(0);
            }
        }
    }

    /// Whether the daemon said that all of this is filled.
    pub(crate) fn is_filled(&self, file: FileId, offset: u64, count: u64) -> bool {
        self.by_id.get(&file).is_some_and(|watched| watched.present.covers(offset, count))
    }

    /// Whose access is this?
    pub(crate) fn judge(&self, inode: Inode) -> Verdict {
        match self.by_inode.get(&inode) {
            Some(&file) if self.by_id.get(&file).is_some_and(|watched| !watched.draining) => {
                Verdict::Relay(file)
            }
            Some(_) => Verdict::Allow,
            None if self.complete.contains(&Some(inode)) => Verdict::Allow,
            None => Verdict::Deny,
        }
    }

    /// An access of the file went into the event table.
    pub(crate) fn event_added(&mut self, file: FileId) {
        if let Some(watched) = self.by_id.get_mut(&file) {
            watched.pending += 1;
        }
    }

    /// One left it.
    pub(crate) fn event_answered(&mut self, file: FileId) {
        if let Some(watched) = self.by_id.get_mut(&file) {
            watched.pending = watched.pending.saturating_sub(1);
        }
        self.forget_drained(file);
    }

    /// The files that are complete but still have accesses waiting.
    pub(crate) fn draining(&self) -> Vec<FileId> {
        self.by_id.iter().filter(|(_, watched)| watched.draining).map(|(&file, _)| file).collect()
    }

    fn forget_drained(&mut self, file: FileId) {
        if self.by_id.get(&file).is_some_and(|watched| watched.draining && watched.pending == 0) {
            self.remove(file);
        }
    }

    fn remove(&mut self, file: FileId) {
        if let Some(watched) = self.by_id.remove(&file) {
            self.by_inode.remove(&watched.inode);
            // Before its descriptor closes, whose number would come to mean another file.
            kept::forget(watched.writer.as_raw_fd());
            self.ledger.clear_file(watched.slot);
            self.free_slots.push(watched.slot);
        }
    }
}

fn unmark(group: &Group, watched: &Watched) -> Result<(), Errno> {
    match group.unmark(&watched.writer) {
        // The kernel drops the mark of a file that was deleted and closed everywhere else.
        Ok(()) | Err(skimmer_fanotify::GroupError::NotMarked(_)) => Ok(()),
        Err(error) => Err(Errno::new(error.raw_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skimmer_fanotify::EventAccess;
    use skimmer_test_support::{scratch_dir, skip_this};
    use std::fs::File;

    fn file(dir: &tempfile::TempDir, name: &str) -> (File, OwnedFd, Inode) {
        let file =
            File::options().read(true).write(true).create_new(true).open(dir.path().join(name)).unwrap();
        let writer = OwnedFd::from(file.try_clone().unwrap());
        let (inode, _) = Inode::of(file.as_fd()).unwrap();
        (file, writer, inode)
    }

    #[test]
    fn only_complete_files_are_let_through() {
        let dir = scratch_dir();
        if let Err(why) = skimmer_fanotify::probe(dir.path()) {
            return skip_this(&why.to_string());
        }
        let group = Group::new(EventAccess::ReadOnly).unwrap();
        let label = Label::new("").unwrap();
        let mut files = Files::new(2, Rc::new(Ledger::new().unwrap()));
        let (first, writer, inode) = file(&dir, "first");
        assert_eq!(files.judge(inode), Verdict::Deny);
        files.watch(&group, FileId(1), label, writer).unwrap();
        assert_eq!(files.judge(inode), Verdict::Relay(FileId(1)));

        // Complete with an access waiting: it drains, and what comes late is let through.
        files.event_added(FileId(1));
        files.unwatch(&group, FileId(1), true).unwrap();
        assert_eq!((files.judge(inode), files.len(), files.names().len()), (Verdict::Allow, 1, 0));
        assert_eq!(files.draining(), [FileId(1)]);
        files.event_answered(FileId(1));
        assert_eq!((files.judge(inode), files.len()), (Verdict::Allow, 0));

        // Watched anew and unwatched incomplete, it is no longer known as complete.
        let writer = OwnedFd::from(first);
        files.watch(&group, FileId(2), label, writer).unwrap();
        assert_eq!(files.judge(inode), Verdict::Relay(FileId(2)));
        files.unwatch(&group, FileId(2), false).unwrap();
        assert_eq!(files.judge(inode), Verdict::Deny);
    }

    #[test]
    fn the_table_has_an_end() {
        let dir = scratch_dir();
        if let Err(why) = skimmer_fanotify::probe(dir.path()) {
            return skip_this(&why.to_string());
        }
        let group = Group::new(EventAccess::ReadOnly).unwrap();
        let label = Label::new("").unwrap();
        let mut files = Files::new(1, Rc::new(Ledger::new().unwrap()));
        let (_one, writer, _) = file(&dir, "one");
        files.watch(&group, FileId(1), label, writer).unwrap();
        let (_two, writer, inode) = file(&dir, "two");
        assert_eq!(files.watch(&group, FileId(2), label, writer).unwrap_err().raw(), libc::EMFILE);
        assert_eq!(files.judge(inode), Verdict::Deny);
    }
}
