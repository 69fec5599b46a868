//! A packet between keeper and daemon, in both directions.

use skimmer_keeper::protocol::{MESSAGE_LEN, Reply, Request};

/// Decodes `data` as a request and as a reply; what decodes must survive a second trip.
pub fn run(data: &[u8]) {
    let request = Request::decode(data);
    if let Ok((seq, request)) = &request {
        assert_eq!(data.len(), MESSAGE_LEN);
        assert_eq!(Request::decode(&request.encode(*seq)), Ok((*seq, *request)));
    }
    let reply = Reply::decode(data);
    match &reply {
        Ok(reply) => {
            assert_eq!(Reply::decode(&reply.encode()).as_ref(), Ok(reply));
            assert!(request.is_err(), "a packet that means something in both directions");
            if let Reply::Event { offset, count, .. } = reply {
                assert!(offset.checked_add(*count).is_some());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
