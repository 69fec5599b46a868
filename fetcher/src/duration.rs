//! Times as Go programs write them in their configuration.

use std::time::Duration;

/// A time as Go writes it: `1m30s`, `500ms`, `1.5s`.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let seconds = match &rest[digits..unit_end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        sum = sum.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    Some(sum).filter(|sum| !sum.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_go() {
        assert_eq!(parse("1m1.5s"), Some(Duration::from_millis(61_500)));
        assert_eq!(parse("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse("12h0m0s"), Some(Duration::from_secs(43_200)));
        for bad in ["", "3", "s", "1x", "1s2", "-1s", "0s", "1e400s"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
