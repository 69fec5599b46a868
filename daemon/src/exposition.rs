//! The metrics as text: `OpenMetrics` for those who ask for it, Prometheus' older format for all others.

use std::fmt::{Error, Write as _};

use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// A form of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `OpenMetrics` 1.0.
    OpenMetrics,
    /// Version 0.0.4 of the text format: counters have `_total` in the name of their family, too.
    Text,
}

impl Format {
    /// What a request's `Accept` asks for.
    #[must_use]
    pub fn accepted(accept: Option<&str>) -> Self {
        if accept.is_some_and(|kinds| kinds.contains("application/openmetrics-text")) {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// The content type.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Writes all metrics.
    ///
    /// # Errors
    /// When one of them cannot be written.
    pub fn encode(self, registry: &Registry) -> Result<String, Error> {
        let mut text = String::new();
        text::encode(&mut text, registry)?;
        match self {
            Self::OpenMetrics => Ok(text),
            Self::Text => older(&text),
        }
    }
}

/// The same in the older format: descriptions of counters get their `_total`, those that it does not know go.
fn older(text: &str) -> Result<String, Error> {
    let mut older = String::with_capacity(text.len());
    // A family's description comes before its type.
    let mut help = None;
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), told) => help = Some((name, told.unwrap_or_default())),
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let total = if kind == "counter" { "_total" } else { "" };
                if let Some((_, told)) = help.take().filter(|(of, _)| *of == name) {
                    writeln!(older, "# HELP {name}{total} {told}")?;
                }
                writeln!(older, "# TYPE {name}{total} {kind}")?;
            }
            (Some("#"), ..) => {}
            _ => writeln!(older, "{line}")?,
        }
    }
    Ok(older)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::registry::Unit;

    #[test]
    fn both_formats_say_the_same() {
        let mut registry = Registry::default();
        let bytes: Counter = Counter::default();
        bytes.inc_by(7);
        registry.register_with_unit("moved", "Bytes moved", Unit::Bytes, bytes);
        registry.register("waiting", "Those that wait", Gauge::<i64>::default());
        let open = Format::OpenMetrics.encode(&registry).unwrap();
        assert!(open.contains("# TYPE moved_bytes counter\n") && open.ends_with("# EOF\n"), "{open}");
        let text = Format::Text.encode(&registry).unwrap();
        let expected = "# HELP moved_bytes_total Bytes moved.\n# TYPE moved_bytes_total counter\n\
                        moved_bytes_total 7\n# HELP waiting Those that wait.\n# TYPE waiting gauge\nwaiting 0\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn who_does_not_ask_gets_the_older() {
        assert_eq!(Format::accepted(None), Format::Text);
        assert_eq!(Format::accepted(Some("*/*")), Format::Text);
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3";
        assert_eq!(Format::accepted(Some(prometheus)), Format::OpenMetrics);
    }
}
