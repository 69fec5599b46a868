//! A request read from `/dev/cachefiles`.

use skimmer_cachefiles::message::{Body, MAX_LEN, decode};

/// Decodes `data` as one message; what decodes must say the same when it is written again.
pub fn run(data: &[u8]) {
    match decode(data) {
        Ok(message) => {
            assert_ne!(message.object_id, 0);
            match &message.body {
                Body::Open(open) => {
                    assert!(open.fd >= 0 && !open.cookie_key.is_empty() && !open.volume_key.contains(&0));
                }
                Body::Read { offset, len } => assert!(*len > 0 && offset.checked_add(*len).is_some()),
                Body::Close => {}
            }
            if data.len() <= MAX_LEN {
                assert_eq!(message.encode().as_deref(), Ok(data));
            }
        }
        Err(error) => {
            assert!(error.offset <= data.len().max(16), "an error at byte {}", error.offset);
            // A descriptor that leaks hangs the next mount: it is named only when it can be closed.
            assert!(error.fd.is_none_or(|fd| fd >= 0));
            assert!(!error.to_string().is_empty());
        }
    }
}
