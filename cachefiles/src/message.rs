//! The kernel's requests, decoded by pure functions of bytes.
//!
//! Layout: `struct cachefiles_msg`, `cachefiles_open` and `cachefiles_read` in `include/uapi/linux/cachefiles.h`, native
//! endian; the same in every release that has them.

/// `CACHEFILES_MSG_MAX_SIZE`: a buffer of this size fits every message.
pub const MAX_LEN: usize = 1024;
/// Length of the header that starts every message.
pub const HEADER_LEN: usize = 16;
/// Length of the fixed part of an OPEN payload.
const OPEN_LEN: usize = 16;
/// Length of a READ payload.
const READ_LEN: usize = 16;

/// A decoded request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The kernel's number for the request, unique among the pending ones; answers name it.
    pub msg_id: u32,
    /// The object it is about; changes when the kernel opens the object anew.
    pub object_id: u32,
    /// What is asked.
    pub body: Body,
}

/// What a request asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// An object is opened.
    Open(Open),
    /// An object is done with; no answer.
    Close,
    /// A range of an object is missing.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1; the end does not overflow.
        len: u64,
    },
}

/// Payload of OPEN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Key of the volume, without its NUL; for EROFS `erofs,` and the domain or fsid.
    pub volume_key: Box<[u8]>,
    /// Key of the cookie; for EROFS the fsid or a device tag.
    pub cookie_key: Box<[u8]>,
    /// Descriptor, installed in the reading process, without close-on-exec.
    pub fd: i32,
    /// 0 in every release so far.
    pub flags: u32,
}

/// A message that does not follow the layout. `offset` counts from its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cachefiles message{}, byte {offset}: {fault}", OfMessage(*.header))]
pub struct MessageError {
    /// Where the faulty field starts.
    pub offset: usize,
    /// What is wrong with it.
    pub fault: Fault,
    /// The header where it could be read: the request must still be answered.
    pub header: Option<Header>,
    /// Descriptor of an OPEN where it could be read: it must still be closed.
    pub fd: Option<i32>,
}

struct OfMessage(Option<Header>);

impl std::fmt::Display for OfMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(header) => write!(f, " {} of object {}", header.msg_id, header.object_id),
            None => Ok(()),
        }
    }
}

/// The fixed fields of a message, as read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the request.
    pub msg_id: u32,
    /// 0 OPEN, 1 CLOSE, 2 READ.
    pub opcode: u32,
    /// Length of the whole message.
    pub len: u32,
    /// Object.
    pub object_id: u32,
}

impl Header {
    /// Opcode of OPEN.
    pub const OPEN: u32 = 0;
    /// Opcode of CLOSE.
    pub const CLOSE: u32 = 1;
    /// Opcode of READ.
    pub const READ: u32 = 2;
}

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Fewer bytes than the header.
    #[error("{0} bytes, the header has 16")]
    Short(usize),
    /// The length field disagrees with what was read.
    #[error("len {len}, but {read} bytes were read")]
    Len {
        /// The field.
        len: u32,
        /// Bytes read.
        read: usize,
    },
    /// Unknown opcode.
    #[error("opcode {0}, known are 0 to 2")]
    Opcode(u32),
    /// Object id 0.
    #[error("object_id 0")]
    Object,
    /// Payload of another length than the opcode has.
    #[error("payload of {len} bytes, {expected} expected")]
    Payload {
        /// Bytes there.
        len: usize,
        /// Bytes that the opcode and its fields call for.
        expected: u64,
    },
    /// A volume key without a character or without its NUL.
    #[error("volume key of {0} bytes does not end in its only NUL")]
    VolumeKey(u32),
    /// An empty cookie key.
    #[error("cookie key is empty")]
    CookieKey,
    /// A negative descriptor.
    #[error("descriptor {0}")]
    Fd(i32),
    /// A range that is empty or overflows.
    #[error("range of {len} bytes at {offset}")]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Decodes one message, all of `bytes`.
///
/// # Errors
/// [`MessageError`] names the field and its offset.
pub fn decode(bytes: &[u8]) -> Result<Message, MessageError> {
    let bare = |offset, fault| MessageError { offset, fault, header: None, fd: None };
    let Some((head, payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Err(bare(0, Fault::Short(bytes.len())));
    };
    let header = Header {
        msg_id: word(head, 0),
        opcode: word(head, 4),
        len: word(head, 8),
        object_id: word(head, 12),
    };
    let fd = match (header.opcode, payload.first_chunk::<OPEN_LEN>()) {
        (Header::OPEN, Some(fixed)) => Some(signed(fixed, 8)).filter(|&fd| fd >= 0),
        _ => None,
    };
    let fault = |offset, fault| MessageError { offset, fault, header: Some(header), fd };
    if u64::from(header.len) != u64::try_from(bytes.len()).unwrap_or(u64::MAX) {
        return Err(fault(8, Fault::Len { len: header.len, read: bytes.len() }));
    }
    if header.object_id == 0 {
        return Err(fault(12, Fault::Object));
    }
    let body = match header.opcode {
        Header::OPEN => open(payload).map_err(|(offset, what)| fault(offset, what))?,
        Header::CLOSE if payload.is_empty() => Body::Close,
        Header::CLOSE => return Err(fault(HEADER_LEN, Fault::Payload { len: payload.len(), expected: 0 })),
        Header::READ => read(payload).map_err(|(offset, what)| fault(offset, what))?,
        opcode => return Err(fault(4, Fault::Opcode(opcode))),
    };
    Ok(Message { msg_id: header.msg_id, object_id: header.object_id, body })
}

fn open(payload: &[u8]) -> Result<Body, (usize, Fault)> {
    let Some((fixed, keys)) = payload.split_first_chunk::<OPEN_LEN>() else {
        return Err((HEADER_LEN, Fault::Payload { len: payload.len(), expected: 16 }));
    };
    let (volume_len, cookie_len) = (word(fixed, 0), word(fixed, 4));
    let (fd, flags) = (signed(fixed, 8), word(fixed, 12));
    let expected = 16 + u64::from(volume_len) + u64::from(cookie_len);
    let split = usize::try_from(volume_len).ok().and_then(|at| keys.split_at_checked(at));
    let (volume, cookie_key) = match split {
        Some(split) if u64::try_from(payload.len()).ok() == Some(expected) => split,
        _ => return Err((HEADER_LEN, Fault::Payload { len: payload.len(), expected })),
    };
    // The length of the volume key counts its NUL, that of the cookie key has none.
    let volume_key = match volume.split_last() {
        Some((0, key)) if !key.is_empty() && !key.contains(&0) => key,
        _ => return Err((HEADER_LEN + OPEN_LEN, Fault::VolumeKey(volume_len))),
    };
    if cookie_key.is_empty() {
        return Err((HEADER_LEN + 4, Fault::CookieKey));
    }
    if fd < 0 {
        return Err((HEADER_LEN + 8, Fault::Fd(fd)));
    }
    Ok(Body::Open(Open { volume_key: volume_key.into(), cookie_key: cookie_key.into(), fd, flags }))
}

fn read(payload: &[u8]) -> Result<Body, (usize, Fault)> {
    let Ok(fixed) = <&[u8; READ_LEN]>::try_from(payload) else {
        return Err((HEADER_LEN, Fault::Payload { len: payload.len(), expected: 16 }));
    };
    let (offset, len) = (u64::from_ne_bytes(array(fixed, 0)), u64::from_ne_bytes(array(fixed, 8)));
    // The kernel's offsets are signed.
    if len == 0 || offset.checked_add(len).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err((HEADER_LEN, Fault::Range { offset, len }));
    }
    Ok(Body::Read { offset, len })
}

impl Message {
    /// The bytes the kernel would send, for tests and stand-ins.
    ///
    /// # Errors
    /// [`Fault`] when the message does not fit the layout.
    pub fn encode(&self) -> Result<Vec<u8>, Fault> {
        let mut payload = Vec::new();
        let opcode = match &self.body {
            Body::Open(open) => {
                let size = |len: usize| {
                    u32::try_from(len).map_err(|_| Fault::Payload { len, expected: u64::from(u32::MAX) })
                };
                payload.extend(size(open.volume_key.len().saturating_add(1))?.to_ne_bytes());
                payload.extend(size(open.cookie_key.len())?.to_ne_bytes());
                payload.extend(open.fd.to_ne_bytes());
                payload.extend(open.flags.to_ne_bytes());
                payload.extend(&open.volume_key);
                payload.push(0);
                payload.extend(&open.cookie_key);
                Header::OPEN
            }
            Body::Close => Header::CLOSE,
            Body::Read { offset, len } => {
                payload.extend(offset.to_ne_bytes());
                payload.extend(len.to_ne_bytes());
                Header::READ
            }
        };
        let len = HEADER_LEN.saturating_add(payload.len());
        let len = match u32::try_from(len) {
            Ok(field) if len <= MAX_LEN => field,
            _ => return Err(Fault::Payload { len: payload.len(), expected: 1008 }),
        };
        let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
        for field in [self.msg_id, opcode, len, self.object_id] {
            out.extend(field.to_ne_bytes());
        }
        out.extend(payload);
        Ok(out)
    }
}

/// `N` bytes at `at`; callers pass constants inside their fixed-size record.
fn array<const N: usize, const M: usize>(record: &[u8; M], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&record[at..at + N]);
    out
}

fn word<const M: usize>(record: &[u8; M], at: usize) -> u32 {
    u32::from_ne_bytes(array(record, at))
}

fn signed<const M: usize>(record: &[u8; M], at: usize) -> i32 {
    i32::from_ne_bytes(array(record, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An OPEN as a 6.12 kernel sent it for `fsid=full.img`, by 32-bit words.
    const CAPTURED: &str = "00000000 00000000 37000000 01000000 0f000000 08000000 04000000 00000000 \
                            65726f66 732c6675 6c6c2e69 6d670066 756c6c2e 696d67";

    fn captured() -> Vec<u8> {
        let hex: String = CAPTURED.split_whitespace().collect();
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn open_message() -> Message {
        Message {
            msg_id: 0,
            object_id: 1,
            body: Body::Open(Open {
                volume_key: b"erofs,full.img"[..].into(),
                cookie_key: b"full.img"[..].into(),
                fd: 4,
                flags: 0,
            }),
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn captured_open() {
        assert_eq!(decode(&captured()), Ok(open_message()));
        assert_eq!(open_message().encode(), Ok(captured()));
    }

    #[test]
    fn read_and_close() {
        for body in [Body::Close, Body::Read { offset: 4096, len: 131_072 }] {
            let message = Message { msg_id: 7, object_id: 3, body };
            assert_eq!(decode(&message.encode().unwrap()), Ok(message));
        }
    }

    fn broken(bytes: &[u8], at: usize, field: &[u8]) -> MessageError {
        let mut bytes = bytes.to_vec();
        bytes[at..at + field.len()].copy_from_slice(field);
        decode(&bytes).unwrap_err()
    }

    #[test]
    fn header_faults() {
        let good = open_message().encode().unwrap();
        let short = decode(&good[..15]).unwrap_err();
        assert_eq!(short, MessageError { offset: 0, fault: Fault::Short(15), header: None, fd: None });
        let error = broken(&good, 8, &56u32.to_ne_bytes());
        assert_eq!((error.offset, error.fault), (8, Fault::Len { len: 56, read: 55 }));
        assert_eq!(error.fd, Some(4));
        let error = broken(&good, 12, &[0; 4]);
        assert_eq!((error.offset, error.fault), (12, Fault::Object));
        let error = broken(&good, 4, &3u32.to_ne_bytes());
        assert_eq!((error.offset, error.fault, error.fd), (4, Fault::Opcode(3), None));
        let truncated = decode(&good[..40]).unwrap_err();
        assert_eq!(truncated.fault, Fault::Len { len: 55, read: 40 });
    }

    #[test]
    fn open_faults() {
        let good = open_message().encode().unwrap();
        let error = broken(&good, 16, &u32::MAX.to_ne_bytes());
        let expected = 16 + u64::from(u32::MAX) + 8;
        assert_eq!((error.offset, error.fault), (16, Fault::Payload { len: 39, expected }));
        let error = broken(&good, 20, &9u32.to_ne_bytes());
        assert_eq!((error.offset, error.fault), (16, Fault::Payload { len: 39, expected: 40 }));
        let error = broken(&good, 46, b"x");
        assert_eq!((error.offset, error.fault), (32, Fault::VolumeKey(15)));
        let error = broken(&good, 40, &[0]);
        assert_eq!((error.offset, error.fault), (32, Fault::VolumeKey(15)));
        let error = broken(&good, 24, &(-1i32).to_ne_bytes());
        assert_eq!((error.offset, error.fault, error.fd), (24, Fault::Fd(-1), None));
        let mut sizes = 23u32.to_ne_bytes().to_vec();
        sizes.extend([0; 4]);
        let error = broken(&good, 16, &sizes);
        assert_eq!((error.offset, error.fault), (32, Fault::VolumeKey(23)));
    }

    #[test]
    fn read_and_close_faults() {
        let encode = |body| Message { msg_id: 7, object_id: 3, body }.encode().unwrap();
        let good = encode(Body::Read { offset: 4096, len: 4096 });
        for (at, field) in [(24, 0u64), (24, u64::MAX), (16, u64::MAX), (16, 1 << 63)] {
            let error = broken(&good, at, &field.to_ne_bytes());
            assert!(matches!((error.offset, error.fault), (16, Fault::Range { .. })), "{error}");
            assert_eq!(error.header.unwrap().msg_id, 7);
        }
        let mut long = good.clone();
        long.push(0);
        long[8..12].copy_from_slice(&33u32.to_ne_bytes());
        assert_eq!(decode(&long).unwrap_err().fault, Fault::Payload { len: 17, expected: 16 });
        let mut close = encode(Body::Close);
        close.push(0);
        close[8..12].copy_from_slice(&17u32.to_ne_bytes());
        assert_eq!(decode(&close).unwrap_err().fault, Fault::Payload { len: 1, expected: 0 });
    }

    #[test]
    fn errors_read_well() {
        let error = broken(&open_message().encode().unwrap(), 46, b"x");
        let text =
            "cachefiles message 0 of object 1, byte 32: volume key of 15 bytes does not end in its only NUL";
        assert_eq!(error.to_string(), text);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_LEN)) {
            // Random bytes hardly ever pass; what passes says the same when written again.
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(message.encode(), Ok(bytes));
            }
        }

        #[test]
        fn damaged_bytes(at in 0..55usize, value in any::<u8>()) {
            let mut bytes = open_message().encode().unwrap();
            bytes[at] = value;
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(message.encode(), Ok(bytes));
            }
        }

        #[test]
        fn reads_round_trip(msg_id in any::<u32>(), object_id in 1..u32::MAX, offset in 0..1u64 << 62, len in 1..1u64 << 62) {
            let message = Message { msg_id, object_id, body: Body::Read { offset, len } };
            prop_assert_eq!(decode(&message.encode().unwrap()), Ok(message));
        }
    }
}
