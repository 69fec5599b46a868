//! What the reply to a range request is worth.
//!
//! A server may ignore ranges, shift them, shorten them or answer with a page of its own; only what is
//! proved by status and headers is taken.

use std::ops::Range;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap};

use crate::source::ErrorClass;

/// A reply whose body may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// 206: the body is the range from its start up to `end` (exclusive), which may be short of what was asked.
    Part {
        /// End of what the server sends.
        end: u64,
    },
    /// 200 for a range at 0: the body is the whole blob, to be cut at the end of the range.
    Whole,
}

/// A parsed `Content-Range: bytes first-last/total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContentRange {
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// `None` for `*`.
    pub(crate) total: Option<u64>,
}

/// Reads one `Content-Range` of a satisfied request; `None` when it breaks the grammar or contradicts itself.
pub(crate) fn parse_content_range(text: &str) -> Option<ContentRange> {
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        if digits { text.parse().ok() } else { None }
    };
    let (unit, rest) = text.split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let total = if total == "*" { None } else { Some(number(total)?) };
    let consistent = first <= last && total.is_none_or(|total| last < total);
    consistent.then_some(ContentRange { first, last, total })
}

/// What a status other than success means.
pub(crate) fn status_class(status: StatusCode) -> ErrorClass {
    match status.as_u16() {
        401 | 403 => ErrorClass::Denied,
        404 | 410 => ErrorClass::NotFound,
        416 => ErrorClass::BadRange,
        408 | 425 | 429 | 500 | 502 | 503 | 504 => ErrorClass::Transient,
        _ => ErrorClass::BadReply,
    }
}

/// Judges status and headers of a reply to `Range: bytes=start-(end-1)` for a blob of `size` bytes.
pub(crate) fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    range: &Range<u64>,
    size: u64,
) -> Result<Accepted, (ErrorClass, String)> {
    let bad = |detail: String| Err((ErrorClass::BadReply, detail));
    if status == StatusCode::PARTIAL_CONTENT || status == StatusCode::OK {
        if let Some(encoding) = headers.get(CONTENT_ENCODING)
            && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
        {
            return bad(format!(
                "the reply has the content encoding {encoding:?} although none was asked for"
            ));
        }
        if let Some(kind) = headers.get(CONTENT_TYPE)
            && kind.as_bytes().to_ascii_lowercase().starts_with(b"multipart/byteranges")
        {
            return bad("the reply is multipart/byteranges for a single range".to_owned());
        }
    }
    let length = match single(headers, CONTENT_LENGTH.as_str()) {
        Ok(None) => None,
        Ok(Some(text)) => match text.trim().parse::<u64>() {
            Ok(length) => Some(length),
            Err(_) => return bad("Content-Length is no number".to_owned()),
        },
        Err(detail) => return bad(detail),
    };
    match status {
        StatusCode::PARTIAL_CONTENT => {
            let text = match single(headers, CONTENT_RANGE.as_str()) {
                Ok(Some(text)) => text,
                Ok(None) => return bad("206 without Content-Range".to_owned()),
                Err(detail) => return bad(detail),
            };
            let shown: String = text.chars().take(80).collect();
            let Some(got) = parse_content_range(text) else {
                return bad(format!("Content-Range `{shown}` cannot be read"));
            };
            if got.first != range.start || got.last >= range.end {
                return bad(format!("Content-Range `{shown}` is not what was asked for"));
            }
            if got.total.is_some_and(|total| total != size) {
                return bad(format!("Content-Range `{shown}`: the blob has {size} bytes"));
            }
            let count = got.last - got.first + 1;
            if length.is_some_and(|length| length != count) {
                return bad(format!("Content-Length is not the {count} bytes of Content-Range `{shown}`"));
            }
            Ok(Accepted::Part { end: got.last + 1 })
        }
        StatusCode::OK => match length {
            Some(length) if length != size => bad(format!(
                "HTTP 200 with {length} bytes for a blob of {size}: another object or a proxy's page"
            )),
            _ if range.start > 0 => {
                Err((ErrorClass::NoRanges, "the server ignores ranges (HTTP 200 instead of 206)".to_owned()))
            }
            _ => Ok(Accepted::Whole),
        },
        status => Err((status_class(status), format!("HTTP {status}"))),
    }
}

/// The value of a header that may come once at most.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, String> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| format!("{name} is not text")),
        (Some(_), Some(_)) => Err(format!("{name} comes more than once")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn class(status: u16, list: &[(&'static str, &str)], range: Range<u64>) -> Result<Accepted, ErrorClass> {
        judge(StatusCode::from_u16(status).unwrap(), &headers(list), &range, 100).map_err(|(class, _)| class)
    }

    #[test]
    fn partial_replies() {
        let part = |list: &[(&'static str, &str)]| class(206, list, 10..20);
        assert_eq!(part(&[("content-range", "bytes 10-19/100")]), Ok(Accepted::Part { end: 20 }));
        assert_eq!(part(&[("content-range", "bytes 10-19/*")]), Ok(Accepted::Part { end: 20 }));
        assert_eq!(
            part(&[("content-range", "bytes 10-14/100"), ("content-length", "5")]),
            Ok(Accepted::Part { end: 15 })
        );
        for list in [
            &[][..],
            &[("content-range", "bytes 11-19/100")],
            &[("content-range", "bytes 9-19/100")],
            &[("content-range", "bytes 10-20/100")],
            &[("content-range", "bytes 10-19/101")],
            &[("content-range", "bytes 10-19/100"), ("content-length", "11")],
            &[("content-range", "bytes 10-19/100"), ("content-range", "bytes 10-19/100")],
            &[("content-range", "bytes 10-19/100"), ("content-encoding", "gzip")],
            &[("content-range", "bytes 10-19/100"), ("content-type", "multipart/byteranges; boundary=x")],
            &[("content-range", "bytes */100")],
            &[("content-range", "items 10-19/100")],
        ] {
            assert_eq!(part(list), Err(ErrorClass::BadReply), "{list:?}");
        }
    }

    #[test]
    fn other_replies() {
        assert_eq!(class(200, &[("content-length", "100")], 0..20), Ok(Accepted::Whole));
        assert_eq!(class(200, &[], 0..20), Ok(Accepted::Whole));
        assert_eq!(class(200, &[("content-length", "20")], 0..20), Err(ErrorClass::BadReply));
        assert_eq!(class(200, &[("content-length", "100")], 1..20), Err(ErrorClass::NoRanges));
        for (status, expected) in [
            (204, ErrorClass::BadReply),
            (302, ErrorClass::BadReply),
            (400, ErrorClass::BadReply),
            (401, ErrorClass::Denied),
            (403, ErrorClass::Denied),
            (404, ErrorClass::NotFound),
            (416, ErrorClass::BadRange),
            (429, ErrorClass::Transient),
            (503, ErrorClass::Transient),
            (501, ErrorClass::BadReply),
        ] {
            assert_eq!(class(status, &[], 0..20), Err(expected), "{status}");
        }
    }

    proptest! {
        #[test]
        fn any_content_range_is_handled(text in "(bytes )?[0-9*/ -]{0,60}|\\PC{0,60}") {
            if let Some(range) = parse_content_range(&text) {
                prop_assert!(range.first <= range.last);
                prop_assert!(range.total.is_none_or(|total| range.last < total));
            }
        }

        #[test]
        fn content_ranges_round_trip(first in any::<u64>(), length in 0..1u64 << 40, more in proptest::option::of(1..1u64 << 40)) {
            let last = first.saturating_add(length);
            let total = more.and_then(|more| last.checked_add(more));
            let shown = total.map_or("*".to_owned(), |total| total.to_string());
            let text = format!("bytes {first}-{last}/{shown}");
            prop_assert_eq!(parse_content_range(&text), Some(ContentRange { first, last, total }));
        }

        #[test]
        fn an_accepted_part_lies_in_the_request(
            start in 0u64..200, length in 1u64..200, first in 0u64..200, last in 0u64..400, total in 0u64..400
        ) {
            let range = start..start + length;
            let text = format!("bytes {first}-{last}/{total}");
            let list = headers(&[("content-range", &text)]);
            if let Ok(accepted) = judge(StatusCode::PARTIAL_CONTENT, &list, &range, 400) {
                prop_assert_eq!(accepted, Accepted::Part { end: last + 1 });
                prop_assert!(first == start && last < range.end && total == 400);
            }
        }
    }
}
