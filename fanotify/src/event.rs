//! The bytes that a read of the group returns, decoded by pure functions.
//!
//! Layout: `struct fanotify_event_metadata` and `struct fanotify_event_info_range` in `include/uapi/linux/fanotify.h`,
//! native endian.

/// Length of `struct fanotify_event_metadata`.
pub const METADATA_LEN: usize = 24;
/// Length of `struct fanotify_event_info_range`.
pub const RANGE_INFO_LEN: usize = 24;
/// The one version of the metadata layout that exists.
pub const METADATA_VERSION: u8 = 3;
/// Event mask bit: an access that waits for its content.
pub const FAN_PRE_ACCESS: u64 = 0x0010_0000;
/// Event mask bit: the queue was full and events were lost.
pub const FAN_Q_OVERFLOW: u64 = 0x4000;
/// Type of the info record that carries offset and count.
pub const FAN_EVENT_INFO_TYPE_RANGE: u8 = 6;
/// Length of the header that starts every info record.
const INFO_HEADER_LEN: usize = 4;

/// The bytes of a file that an access is about to touch. The kernel widens it to pages, so it may pass the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessRange {
    /// First byte.
    pub offset: u64,
    /// Bytes; 0 for a truncate or a read at the end of the file.
    pub count: u64,
}

/// One event as the kernel wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawEvent {
    /// What happened, `FAN_*` bits.
    pub mask: u64,
    /// Descriptor of the file, opened in the reading process; negative when there is none.
    pub fd: i32,
    /// Process that accesses the file.
    pub pid: i32,
    /// What it accesses; `None` means the position is not known and the whole file must be assumed.
    pub range: Option<AccessRange>,
}

/// An event that does not follow the layout. `offset` counts from the start of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("fanotify event at byte {offset}: {fault}")]
pub struct EventError {
    /// Where the faulty field starts.
    pub offset: usize,
    /// What is wrong with it.
    pub fault: EventFault,
    /// The event's descriptor when that much could be read: it must still be answered and closed.
    pub fd: Option<i32>,
}

/// What is wrong with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventFault {
    /// Fewer bytes than the fixed part.
    #[error("{0} bytes left, the event header has 24")]
    ShortMetadata(usize),
    /// `event_len` is below the fixed part or passes the end of the buffer.
    #[error("event_len {len} with {left} bytes left")]
    EventLen {
        /// The value read.
        len: u32,
        /// Bytes from the start of the event to the end of the buffer.
        left: usize,
    },
    /// `vers` is not 3.
    #[error("version {0}, this program knows 3")]
    Version(u8),
    /// `metadata_len` is below the fixed part or above `event_len`.
    #[error("metadata_len {0}")]
    MetadataLen(u16),
    /// An info record with a length that is too small or passes the end of the event.
    #[error("info record of type {kind} with length {len}, {left} bytes left")]
    InfoLen {
        /// Record type.
        kind: u8,
        /// Length it claims.
        len: u16,
        /// Bytes to the end of the event.
        left: usize,
    },
    /// Offset plus count passes 2^64.
    #[error("range of {count} bytes at {offset} overflows")]
    Range {
        /// Offset read.
        offset: u64,
        /// Count read.
        count: u64,
    },
}

/// Walks the events in `bytes`. After an event whose length is not believable the walk ends; other faults cost only
/// the event they are in.
#[must_use]
pub fn decode(bytes: &[u8]) -> Events<'_> {
    Events { bytes, at: 0 }
}

/// Iterator over the events of one buffer, see [`decode`].
#[derive(Debug)]
pub struct Events<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Iterator for Events<'_> {
    type Item = Result<RawEvent, EventError>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.at;
        let rest = self.bytes.get(start..).filter(|rest| !rest.is_empty())?;
        // The walk ends here unless this event's length turns out to be believable.
        self.at = self.bytes.len();
        let fault = |at: usize, fault, fd| Some(Err(EventError { offset: start + at, fault, fd }));
        let Some(metadata) = rest.first_chunk::<METADATA_LEN>() else {
            return fault(0, EventFault::ShortMetadata(rest.len()), None);
        };
        let fd = i32::from_ne_bytes(array(metadata, 16));
        let len = u32::from_ne_bytes(array(metadata, 0));
        let event = match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(event) if event.len() >= METADATA_LEN => event,
            _ => return fault(0, EventFault::EventLen { len, left: rest.len() }, Some(fd)),
        };
        self.at = start + event.len();
        let version = metadata[4];
        if version != METADATA_VERSION {
            return fault(4, EventFault::Version(version), Some(fd));
        }
        let metadata_len = u16::from_ne_bytes(array(metadata, 6));
        let info_at = usize::from(metadata_len);
        if info_at < METADATA_LEN || info_at > event.len() {
            return fault(6, EventFault::MetadataLen(metadata_len), Some(fd));
        }
        match find_range(event, info_at) {
            Ok(range) => Some(Ok(RawEvent {
                mask: u64::from_ne_bytes(array(metadata, 8)),
                fd,
                pid: i32::from_ne_bytes(array(metadata, 20)),
                range,
            })),
            Err((at, what)) => fault(at, what, Some(fd)),
        }
    }
}

/// Walks the info records of one event by their lengths; unknown types are passed over.
fn find_range(event: &[u8], mut at: usize) -> Result<Option<AccessRange>, (usize, EventFault)> {
    let mut range = None;
    while at < event.len() {
        let rest = &event[at..];
        let Some(header) = rest.first_chunk::<INFO_HEADER_LEN>() else {
            let len = u16::try_from(rest.len()).unwrap_or(u16::MAX);
            return Err((at, EventFault::InfoLen { kind: rest[0], len, left: rest.len() }));
        };
        let (kind, len) = (header[0], u16::from_ne_bytes([header[2], header[3]]));
        let length = usize::from(len);
        let least = if kind == FAN_EVENT_INFO_TYPE_RANGE { RANGE_INFO_LEN } else { INFO_HEADER_LEN };
        if length < least || length > rest.len() {
            return Err((at, EventFault::InfoLen { kind, len, left: rest.len() }));
        }
        if let (FAN_EVENT_INFO_TYPE_RANGE, Some(record)) = (kind, rest.first_chunk::<RANGE_INFO_LEN>()) {
            let offset = u64::from_ne_bytes(array(record, 8));
            let count = u64::from_ne_bytes(array(record, 16));
            if offset.checked_add(count).is_none() {
                return Err((at + 8, EventFault::Range { offset, count }));
            }
            range = Some(AccessRange { offset, count });
        }
        at += length;
    }
    Ok(range)
}

/// `N` bytes at `at`; all callers pass constants inside their fixed-size record.
fn array<const N: usize, const M: usize>(record: &[u8; M], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&record[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One event with its info records, as the kernel lays it out.
    fn event(fd: i32, mask: u64, infos: &[Vec<u8>]) -> Vec<u8> {
        let infos = infos.concat();
        let mut out = Vec::new();
        out.extend(u32::try_from(METADATA_LEN + infos.len()).unwrap().to_ne_bytes());
        out.extend([METADATA_VERSION, 0]);
        out.extend(24u16.to_ne_bytes());
        out.extend(mask.to_ne_bytes());
        out.extend(fd.to_ne_bytes());
        out.extend(77i32.to_ne_bytes());
        out.extend(infos);
        out
    }

    fn range(offset: u64, count: u64) -> Vec<u8> {
        let mut out = vec![FAN_EVENT_INFO_TYPE_RANGE, 0];
        out.extend(24u16.to_ne_bytes());
        out.extend(0u32.to_ne_bytes());
        out.extend(offset.to_ne_bytes());
        out.extend(count.to_ne_bytes());
        out
    }

    fn one(bytes: &[u8]) -> Result<RawEvent, EventError> {
        let mut events = decode(bytes);
        let event = events.next().unwrap();
        assert_eq!(events.next(), None);
        event
    }

    #[test]
    fn event_with_a_range() {
        let bytes = event(9, FAN_PRE_ACCESS, &[range(31_297_536, 16_384)]);
        assert_eq!(bytes.len(), 48);
        assert_eq!(
            one(&bytes),
            Ok(RawEvent {
                mask: FAN_PRE_ACCESS,
                fd: 9,
                pid: 77,
                range: Some(AccessRange { offset: 31_297_536, count: 16_384 })
            })
        );
    }

    #[test]
    fn no_range_record_means_unknown_position() {
        assert_eq!(one(&event(9, FAN_PRE_ACCESS, &[])).unwrap().range, None);
    }

    #[test]
    fn other_records_are_passed_over() {
        let other = vec![200, 0, 8, 0, 1, 2, 3, 4];
        let bytes = event(3, FAN_PRE_ACCESS, &[other.clone(), range(4096, 1), other]);
        assert_eq!(one(&bytes).unwrap().range, Some(AccessRange { offset: 4096, count: 1 }));
    }

    #[test]
    fn several_events_in_one_buffer() {
        let mut bytes = event(4, FAN_PRE_ACCESS, &[range(0, 4096)]);
        bytes.extend(event(-1, FAN_Q_OVERFLOW, &[]));
        bytes.extend(event(5, FAN_PRE_ACCESS, &[]));
        let fds: Vec<i32> = decode(&bytes).map(|event| event.unwrap().fd).collect();
        assert_eq!(fds, [4, -1, 5]);
    }

    #[test]
    fn faults_name_the_field() {
        let good = event(9, FAN_PRE_ACCESS, &[range(4096, 8192)]);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            one(&bad).unwrap_err()
        };
        let error = |offset, fault| EventError { offset, fault, fd: Some(9) };
        assert_eq!(with(0, &23u32.to_ne_bytes()), error(0, EventFault::EventLen { len: 23, left: 48 }));
        assert_eq!(with(0, &49u32.to_ne_bytes()), error(0, EventFault::EventLen { len: 49, left: 48 }));
        assert_eq!(with(4, &[2]), error(4, EventFault::Version(2)));
        assert_eq!(with(6, &20u16.to_ne_bytes()), error(6, EventFault::MetadataLen(20)));
        assert_eq!(with(6, &49u16.to_ne_bytes()), error(6, EventFault::MetadataLen(49)));
        for len in [0u16, 3, 23, 25, 65535] {
            let fault = EventFault::InfoLen { kind: 6, len, left: 24 };
            assert_eq!(with(26, &len.to_ne_bytes()), error(24, fault));
        }
        let fault = EventFault::Range { offset: u64::MAX, count: 8192 };
        assert_eq!(with(32, &u64::MAX.to_ne_bytes()), error(32, fault));
        let short = one(&good[..23]).unwrap_err();
        assert_eq!(short, EventError { offset: 0, fault: EventFault::ShortMetadata(23), fd: None });
    }

    #[test]
    fn a_fault_inside_one_event_spares_the_next() {
        let mut bytes = event(4, FAN_PRE_ACCESS, &[]);
        bytes[4] = 9;
        bytes.extend(event(5, FAN_PRE_ACCESS, &[]));
        let events: Vec<_> = decode(&bytes).collect();
        assert_eq!(events[0].unwrap_err().fd, Some(4));
        assert_eq!(events[1].unwrap().fd, 5);
    }

    proptest! {
        #[test]
        fn any_bytes_end_the_walk(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&bytes).count() <= bytes.len() / METADATA_LEN + 1);
        }

        #[test]
        fn round_trip(fd in any::<i32>(), offset in any::<u64>(), count in any::<u64>()) {
            let bytes = event(fd, FAN_PRE_ACCESS, &[range(offset, count)]);
            match one(&bytes) {
                Ok(event) => prop_assert_eq!((event.fd, event.range), (fd, Some(AccessRange { offset, count }))),
                Err(_) => prop_assert!(offset.checked_add(count).is_none()),
            }
        }
    }
}
