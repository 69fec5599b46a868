//! The events that a read of a fanotify group returns.

use skimmer_fanotify::event::{METADATA_LEN, decode};

/// Walks `data` as a buffer of events.
pub fn run(data: &[u8]) {
    let mut events = 0;
    for event in decode(data) {
        events += 1;
        match event {
            Ok(event) => {
                let end = event.range.map(|range| range.offset.checked_add(range.count));
                assert!(end != Some(None), "a range that overflows");
            }
            Err(error) => {
                assert!(error.offset <= data.len(), "an error at byte {}", error.offset);
                assert!(!error.to_string().is_empty());
            }
        }
    }
    // Each event but a last broken one takes its header's length.
    assert!(events <= data.len() / METADATA_LEN + 1);
}
