//! The messages between keeper and daemon: one fixed-size packet each on a `SOCK_SEQPACKET` socket, native endian.
//!
//! | offset | type | field |
//! |---|---|---|
//! | 0 | u32 | magic |
//! | 4 | u16 | version |
//! | 6 | u16 | kind |
//! | 8 | u32 | sequence number of the command, 0 where there is none |
//! | 12 | i32 | code: errno, flag or process id |
//! | 16 | 3 x u64 | words |
//! | 40 | u8, 7 x 0 | length of the label |
//! | 48 | 96 bytes | label, zero-padded |
//!
//! A descriptor travels beside a packet (`SCM_RIGHTS`) with `Watch`, `File` and `Device`, and with nothing else.

use std::fmt;

/// Length of every packet.
pub const MESSAGE_LEN: usize = 144;
/// Of this protocol. 1 knew only that ranges are filled, and of them nothing more.
pub const VERSION: u16 = 2;
/// Longest label in bytes.
pub const LABEL_MAX: usize = 96;
const MAGIC: u32 = u32::from_le_bytes(*b"SkmK");
const LABEL_AT: usize = 48;
/// The kernel's largest error number.
const ERRNO_MAX: i32 = 4095;

/// One packet.
pub type Message = [u8; MESSAGE_LEN];

/// The daemon's name for a watched file; unique among the watched ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u64);

/// The keeper's name for an access that waits; never used twice in the life of a keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(pub u64);

/// A kernel error number, 1 to 4095.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// `EIO`.
    pub const IO: Self = Self(5);
    /// `EINVAL`.
    pub const INVAL: Self = Self(22);

    /// The error of that number, or `None` when there cannot be one.
    #[must_use]
    pub fn new(raw: i32) -> Option<Self> {
        (1..=ERRNO_MAX).contains(&raw).then_some(Self(raw))
    }

    /// The number.
    #[must_use]
    pub fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::new(errno.raw_os_error()).unwrap_or(Self::IO)
    }
}

impl std::error::Error for Errno {}

/// What a watched file is called in messages and logs, for us its blob id.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Label {
    len: u8,
    bytes: [u8; LABEL_MAX],
}

impl Label {
    const EMPTY: Self = Self { len: 0, bytes: [0; LABEL_MAX] };

    /// A label; `None` when it is longer than [`LABEL_MAX`] bytes or holds control characters.
    #[must_use]
    pub fn new(label: &str) -> Option<Self> {
        if label.chars().any(char::is_control) {
            return None;
        }
        let mut bytes = [0; LABEL_MAX];
        bytes.get_mut(..label.len())?.copy_from_slice(label.as_bytes());
        Some(Self { len: u8::try_from(label.len()).ok()?, bytes })
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Both constructors checked it.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or("")
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a range of a watched file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Nothing, or nothing any more.
    Absent,
    /// The right bytes, as long as the disk takes them: the word of a daemon that lives and would hear of a failure.
    Written,
    /// The right bytes, on disk.
    Durable,
}

/// Daemon to keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Mark the file whose writing descriptor comes along and relay its events.
    Watch {
        /// Name for it.
        file: FileId,
        /// Shown to the next daemon and in logs.
        label: Label,
    },
    /// Remove the mark.
    Unwatch {
        /// Which file.
        file: FileId,
        /// Every byte of it is in place and durable.
        complete: bool,
    },
    /// Let an access go on (`None`) or make it fail.
    Answer {
        /// Which access.
        event: EventId,
        /// The error it fails with.
        errno: Option<Errno>,
    },
    /// What is in these bytes of a watched file: accesses to what is filled and verified the keeper itself lets go on.
    Fill {
        /// Which file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes.
        count: u64,
        /// What is there.
        fill: Fill,
    },
    /// Open `/dev/cachefiles`, or hand out the open one.
    OpenDevice,
    /// Close `/dev/cachefiles`.
    CloseDevice,
    /// Exit if nothing is held.
    Stop,
}

/// Why the keeper does not serve a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Another daemon is served; its process id.
    Busy(i32),
    /// The peer runs as another user.
    User,
    /// The connection broke the protocol or speaks another version of it.
    Protocol,
}

/// Keeper to daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// First packet of an accepted connection; `files` packets of kind `File` follow.
    Welcome {
        /// The keeper's process id.
        pid: i32,
        /// `/dev/cachefiles` is open here.
        device_held: bool,
        /// Number of `File` packets.
        files: u64,
    },
    /// The keeper closes the connection after this.
    Refused(Refusal),
    /// A file that is watched already; its writing descriptor comes along.
    File {
        /// Its name.
        file: FileId,
        /// Its label.
        label: Label,
    },
    /// An access waits.
    Event {
        /// Its name.
        event: EventId,
        /// The file it reads.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes.
        count: u64,
    },
    /// Outcome of the command with that sequence number.
    Done {
        /// Sequence number.
        seq: u32,
        /// The error, if it failed.
        errno: Option<Errno>,
    },
    /// The device comes along; outcome of `OpenDevice`.
    Device {
        /// Sequence number.
        seq: u32,
    },
    /// An answer named an event that does not wait (any more).
    Stale {
        /// The name given.
        event: EventId,
    },
}

/// A packet that does not follow the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not one packet long.
    #[error("packet of {0} bytes, all have {MESSAGE_LEN}")]
    Length(usize),
    /// Not ours.
    #[error("packet does not start with the magic number (byte 0: {0:#010x})")]
    Magic(u32),
    /// Another version.
    #[error("the peer speaks version {0} of the keeper protocol, this program version {VERSION} (byte 4)")]
    Version(u16),
    /// Unknown kind, or one of the other direction.
    #[error("packet of unknown kind {0} (byte 6)")]
    Kind(u16),
    /// A field with an impossible value.
    #[error("{kind}: impossible {field} at byte {offset}")]
    Field {
        /// Packet kind.
        kind: &'static str,
        /// Field.
        field: &'static str,
        /// Where it is.
        offset: usize,
    },
    /// A descriptor is missing, or one came along that does not belong there.
    #[error("{kind}: {}", if *.expected { "a descriptor should have come along" } else { "an unexpected descriptor" })]
    Descriptor {
        /// Packet kind.
        kind: &'static str,
        /// Whether one belongs there.
        expected: bool,
    },
}

/// The fields that all packets share, before they mean anything.
#[derive(Clone, Copy)]
struct Packet {
    kind: u16,
    seq: u32,
    code: i32,
    words: [u64; 3],
    label: Label,
}

impl Packet {
    fn new(kind: u16, seq: u32, code: i32, words: [u64; 3]) -> Self {
        Self { kind, seq, code, words, label: Label::EMPTY }
    }

    fn encode(&self) -> Message {
        let mut out = [0; MESSAGE_LEN];
        out[0..4].copy_from_slice(&MAGIC.to_ne_bytes());
        out[4..6].copy_from_slice(&VERSION.to_ne_bytes());
        out[6..8].copy_from_slice(&self.kind.to_ne_bytes());
        out[8..12].copy_from_slice(&self.seq.to_ne_bytes());
        out[12..16].copy_from_slice(&self.code.to_ne_bytes());
        for (slot, word) in out[16..40].chunks_exact_mut(8).zip(self.words) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        out[40] = self.label.len;
        out[LABEL_AT..].copy_from_slice(&self.label.bytes);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let bytes: &Message = bytes.try_into().map_err(|_| ProtocolError::Length(bytes.len()))?;
        let magic = u32::from_ne_bytes(array(bytes, 0));
        if magic != MAGIC {
            return Err(ProtocolError::Magic(magic));
        }
        let version = u16::from_ne_bytes(array(bytes, 4));
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        let field = |field, offset| ProtocolError::Field { kind: "packet", field, offset };
        let len = bytes[40];
        let text = bytes[LABEL_AT..].get(..usize::from(len)).ok_or(field("label length", 40))?;
        let text = std::str::from_utf8(text).map_err(|_| field("label", LABEL_AT))?;
        let label = Label::new(text).ok_or(field("label", LABEL_AT))?;
        let padding = bytes[41..LABEL_AT].iter().any(|&byte| byte != 0);
        if padding || bytes[LABEL_AT..] != label.bytes {
            return Err(field("padding", 41));
        }
        let word = |at| u64::from_ne_bytes(array(bytes, at));
        Ok(Self {
            kind: u16::from_ne_bytes(array(bytes, 6)),
            seq: u32::from_ne_bytes(array(bytes, 8)),
            code: i32::from_ne_bytes(array(bytes, 12)),
            words: [word(16), word(24), word(32)],
            label,
        })
    }
}

/// `N` bytes at `at`; callers pass constants below the packet length.
fn array<const N: usize>(message: &Message, at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&message[at..at + N]);
    out
}

/// 0 is success, 1 to 4095 an error.
fn errno(kind: &'static str, code: i32) -> Result<Option<Errno>, ProtocolError> {
    match code {
        0 => Ok(None),
        _ => {
            Errno::new(code).map(Some).ok_or(ProtocolError::Field { kind, field: "error number", offset: 12 })
        }
    }
}

fn flag(kind: &'static str, field: &'static str, code: i32) -> Result<bool, ProtocolError> {
    match code {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(ProtocolError::Field { kind, field, offset: 12 }),
    }
}

impl Request {
    /// The packet. `seq` comes back in `Done` or `Device`.
    #[must_use]
    pub fn encode(&self, seq: u32) -> Message {
        match *self {
            Self::Watch { file, label } => Packet { label, ..Packet::new(1, seq, 0, [file.0, 0, 0]) },
            Self::Unwatch { file, complete } => Packet::new(2, seq, i32::from(complete), [file.0, 0, 0]),
            Self::Answer { event, errno } => {
                Packet::new(3, seq, errno.map_or(0, Errno::raw), [event.0, 0, 0])
            }
            Self::OpenDevice => Packet::new(4, seq, 0, [0; 3]),
            Self::CloseDevice => Packet::new(5, seq, 0, [0; 3]),
            Self::Stop => Packet::new(6, seq, 0, [0; 3]),
            Self::Fill { file, offset, count, fill } => {
                let code = match fill {
                    Fill::Absent => 0,
                    Fill::Written => 1,
                    Fill::Durable => 2,
                };
                Packet::new(7, seq, code, [file.0, offset, count])
            }
        }
        .encode()
    }

    /// The request in a packet, and its sequence number.
    ///
    /// # Errors
    /// [`ProtocolError`] names the field.
    pub fn decode(bytes: &[u8]) -> Result<(u32, Self), ProtocolError> {
        let packet = Packet::decode(bytes)?;
        let [first, second, third] = packet.words;
        let request = match packet.kind {
            1 => Self::Watch { file: FileId(first), label: packet.label },
            2 => Self::Unwatch { file: FileId(first), complete: flag("Unwatch", "flag", packet.code)? },
            3 => Self::Answer { event: EventId(first), errno: errno("Answer", packet.code)? },
            4 => Self::OpenDevice,
            5 => Self::CloseDevice,
            6 => Self::Stop,
            7 if second.checked_add(third).is_none() => {
                return Err(ProtocolError::Field { kind: "Fill", field: "range", offset: 24 });
            }
            7 => {
                let fill = match packet.code {
                    0 => Fill::Absent,
                    1 => Fill::Written,
                    2 => Fill::Durable,
                    _ => return Err(ProtocolError::Field { kind: "Fill", field: "fill", offset: 12 }),
                };
                Self::Fill { file: FileId(first), offset: second, count: third, fill }
            }
            kind => return Err(ProtocolError::Kind(kind)),
        };
        Ok((packet.seq, request))
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Watch { .. } => "Watch",
            Self::Unwatch { .. } => "Unwatch",
            Self::Answer { .. } => "Answer",
            Self::Fill { .. } => "Fill",
            Self::OpenDevice => "OpenDevice",
            Self::CloseDevice => "CloseDevice",
            Self::Stop => "Stop",
        }
    }

    /// Whether a descriptor comes along.
    #[must_use]
    pub fn carries_fd(&self) -> bool {
        matches!(self, Self::Watch { .. })
    }
}

impl Reply {
    /// The packet.
    #[must_use]
    pub fn encode(&self) -> Message {
        match *self {
            Self::Welcome { pid, device_held, files } => {
                Packet::new(101, 0, pid, [files, u64::from(device_held), 0])
            }
            Self::Refused(Refusal::Busy(pid)) => Packet::new(102, 0, pid, [0, 0, 0]),
            Self::Refused(Refusal::User) => Packet::new(102, 0, 0, [1, 0, 0]),
            Self::Refused(Refusal::Protocol) => Packet::new(102, 0, 0, [2, 0, 0]),
            Self::File { file, label } => Packet { label, ..Packet::new(103, 0, 0, [file.0, 0, 0]) },
            Self::Event { event, file, offset, count } => {
                // Event and file share the packet with the range: the event's name goes into seq and code.
                let [high, low] = halves(event.0);
                Packet::new(104, low, i32::from_ne_bytes(high.to_ne_bytes()), [file.0, offset, count])
            }
            Self::Done { seq, errno } => Packet::new(105, seq, errno.map_or(0, Errno::raw), [0; 3]),
            Self::Device { seq } => Packet::new(106, seq, 0, [0; 3]),
            Self::Stale { event } => Packet::new(107, 0, 0, [event.0, 0, 0]),
        }
        .encode()
    }

    /// The reply in a packet.
    ///
    /// # Errors
    /// [`ProtocolError`] names the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let packet = Packet::decode(bytes)?;
        let [first, second, third] = packet.words;
        Ok(match packet.kind {
            101 => Self::Welcome {
                pid: packet.code,
                device_held: match second {
                    0 => false,
                    1 => true,
                    _ => return Err(ProtocolError::Field { kind: "Welcome", field: "flag", offset: 24 }),
                },
                files: first,
            },
            102 => Self::Refused(match first {
                0 => Refusal::Busy(packet.code),
                1 => Refusal::User,
                2 => Refusal::Protocol,
                _ => return Err(ProtocolError::Field { kind: "Refused", field: "reason", offset: 16 }),
            }),
            103 => Self::File { file: FileId(first), label: packet.label },
            104 => {
                if second.checked_add(third).is_none() {
                    return Err(ProtocolError::Field { kind: "Event", field: "range", offset: 24 });
                }
                let high = u32::from_ne_bytes(packet.code.to_ne_bytes());
                let event = EventId(u64::from(high) << 32 | u64::from(packet.seq));
                Self::Event { event, file: FileId(first), offset: second, count: third }
            }
            105 => Self::Done { seq: packet.seq, errno: errno("Done", packet.code)? },
            106 => Self::Device { seq: packet.seq },
            107 => Self::Stale { event: EventId(first) },
            kind => return Err(ProtocolError::Kind(kind)),
        })
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Welcome { .. } => "Welcome",
            Self::Refused(_) => "Refused",
            Self::File { .. } => "File",
            Self::Event { .. } => "Event",
            Self::Done { .. } => "Done",
            Self::Device { .. } => "Device",
            Self::Stale { .. } => "Stale",
        }
    }

    /// Whether a descriptor comes along.
    #[must_use]
    pub fn carries_fd(&self) -> bool {
        matches!(self, Self::File { .. } | Self::Device { .. })
    }
}

/// High and low half.
fn halves(word: u64) -> [u32; 2] {
    let bytes = word.to_be_bytes();
    let half = |at: usize| {
        let mut out = [0; 4];
        out.copy_from_slice(&bytes[at..at + 4]);
        u32::from_be_bytes(out)
    };
    [half(0), half(4)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label() -> impl Strategy<Value = Label> {
        "[^\\p{Cc}]{0,24}".prop_map(|text| Label::new(&text).unwrap())
    }

    fn maybe_errno() -> impl Strategy<Value = Option<Errno>> {
        (0..=ERRNO_MAX).prop_map(Errno::new)
    }

    fn fill() -> impl Strategy<Value = Fill> {
        prop_oneof![Just(Fill::Absent), Just(Fill::Written), Just(Fill::Durable)]
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            (any::<u64>(), label()).prop_map(|(file, label)| Request::Watch { file: FileId(file), label }),
            any::<(u64, bool)>()
                .prop_map(|(file, complete)| Request::Unwatch { file: FileId(file), complete }),
            (any::<u64>(), maybe_errno())
                .prop_map(|(event, errno)| Request::Answer { event: EventId(event), errno }),
            (any::<u64>(), any::<u32>(), any::<u32>(), fill()).prop_map(|(file, offset, count, fill)| {
                Request::Fill { file: FileId(file), offset: offset.into(), count: count.into(), fill }
            }),
            Just(Request::OpenDevice),
            Just(Request::CloseDevice),
            Just(Request::Stop),
        ]
    }

    fn reply() -> impl Strategy<Value = Reply> {
        prop_oneof![
            any::<(i32, bool, u64)>().prop_map(|(pid, device_held, files)| Reply::Welcome {
                pid,
                device_held,
                files
            }),
            any::<i32>().prop_map(|pid| Reply::Refused(Refusal::Busy(pid))),
            Just(Reply::Refused(Refusal::User)),
            Just(Reply::Refused(Refusal::Protocol)),
            (any::<u64>(), label()).prop_map(|(file, label)| Reply::File { file: FileId(file), label }),
            any::<(u64, u64, u64, u32)>().prop_map(|(event, file, offset, count)| Reply::Event {
                event: EventId(event),
                file: FileId(file),
                offset: offset >> 1,
                count: u64::from(count),
            }),
            (any::<u32>(), maybe_errno()).prop_map(|(seq, errno)| Reply::Done { seq, errno }),
            any::<u32>().prop_map(|seq| Reply::Device { seq }),
            any::<u64>().prop_map(|event| Reply::Stale { event: EventId(event) }),
        ]
    }

    proptest! {
        #[test]
        fn requests_round_trip(request in request(), seq in any::<u32>()) {
            prop_assert_eq!(Request::decode(&request.encode(seq)), Ok((seq, request)));
        }

        #[test]
        fn replies_round_trip(reply in reply()) {
            prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
        }

        #[test]
        fn any_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Request::decode(&bytes).is_err());
            prop_assert!(Reply::decode(&bytes).is_err());
        }

        #[test]
        fn damage_is_refused_or_understood(request in request(), at in 0..MESSAGE_LEN, bit in 0..8u32) {
            let mut message = request.encode(7);
            message[at] ^= 1 << bit;
            if let Ok((seq, other)) = Request::decode(&message) {
                prop_assert!(seq != 7 || other != request || (16..40).contains(&at) || (8..16).contains(&at)
                    || (LABEL_AT..).contains(&at) || at == 40);
            }
        }
    }

    #[test]
    fn faults_are_named() {
        let good = Request::Stop.encode(1);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good;
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            Request::decode(&bad).unwrap_err()
        };
        assert_eq!(Request::decode(&good[1..]), Err(ProtocolError::Length(143)));
        assert_eq!(with(0, &[0; 4]), ProtocolError::Magic(0));
        assert_eq!(with(4, &1u16.to_ne_bytes()), ProtocolError::Version(1));
        assert_eq!(with(6, &101u16.to_ne_bytes()), ProtocolError::Kind(101));
        assert_eq!(Reply::decode(&good), Err(ProtocolError::Kind(6)));
        let field = |kind, field, offset| ProtocolError::Field { kind, field, offset };
        assert_eq!(with(40, &[97]), field("packet", "label length", 40));
        assert_eq!(with(40, &[1]), field("packet", "label", 48));
        assert_eq!(with(41, &[1]), field("packet", "padding", 41));
        let mut bad = Request::Answer { event: EventId(1), errno: Some(Errno::IO) }.encode(1);
        bad[12..16].copy_from_slice(&4096i32.to_ne_bytes());
        assert_eq!(Request::decode(&bad), Err(field("Answer", "error number", 12)));
        bad[12..16].copy_from_slice(&(-5i32).to_ne_bytes());
        assert_eq!(Request::decode(&bad), Err(field("Answer", "error number", 12)));
    }

    #[test]
    fn labels_have_a_limit() {
        assert_eq!(Label::new(&"x".repeat(96)).unwrap().as_str().len(), 96);
        assert!(Label::new(&"x".repeat(97)).is_none());
        assert!(Label::new("a\nb").is_none());
    }
}
