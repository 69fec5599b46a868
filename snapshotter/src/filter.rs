//! containerd's filters, as far as snapshots have fields: `parent==x,labels."name"==y`.

use crate::Error;
use crate::error::Kind as ErrorKind;
use crate::snapshot::{Kind, Snapshot};

/// Conditions that all must hold.
#[derive(Debug)]
pub(crate) struct Filter(Vec<Condition>);

#[derive(Debug)]
struct Condition {
    field: Field,
    test: Test,
}

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
}

#[derive(Debug, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
}

impl Filter {
    /// Reads a filter.
    ///
    /// # Errors
    /// Where it cannot be read. Patterns (`~=`) are not known.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let mut input = Input { text, at: 0 };
        let mut conditions = Vec::new();
        while !input.rest().is_empty() {
            if !conditions.is_empty() {
                input.expect(",")?;
            }
            conditions.push(input.condition()?);
        }
        Ok(Self(conditions))
    }

    /// Whether a snapshot passes.
    pub(crate) fn matches(&self, snapshot: &Snapshot) -> bool {
        self.0.iter().all(|condition| condition.holds(snapshot))
    }
}

impl Condition {
    fn holds(&self, snapshot: &Snapshot) -> bool {
        let kind = match snapshot.kind {
            Kind::View => "View",
            Kind::Active => "Active",
            Kind::Committed => "Committed",
        };
        let value = match &self.field {
            Field::Name => Some(snapshot.key.as_str()),
            Field::Parent => Some(snapshot.parent.as_deref().unwrap_or("")),
            Field::Kind => Some(kind),
            Field::Label(name) => snapshot.labels.get(name).map(String::as_str),
        };
        let lenient = self.field == Field::Kind;
        let same = |wanted: &str| {
            value.is_some_and(|value| value == wanted || lenient && value.eq_ignore_ascii_case(wanted))
        };
        match &self.test {
            Test::Present => value.is_some_and(|value| !value.is_empty()),
            Test::Equal(wanted) => same(wanted),
            Test::Unequal(unwanted) => !same(unwanted),
        }
    }
}

struct Input<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Input<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn bad(&self, why: &str) -> Error {
        let message = format!("filter `{}`: {why} at byte {}", self.text, self.at);
        Error::new(ErrorKind::InvalidArgument, message)
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<(), Error> {
        if self.take(token) { Ok(()) } else { Err(self.bad(&format!("`{token}` expected"))) }
    }

    fn condition(&mut self) -> Result<Condition, Error> {
        let field = match self.word(|c| c.is_ascii_alphanumeric() || c == '_')? {
            name if name == "name" => Field::Name,
            name if name == "parent" => Field::Parent,
            name if name == "kind" => Field::Kind,
            name if name == "labels" => {
                self.expect(".")?;
                Field::Label(self.word(|c| !matches!(c, '=' | '!' | '~' | ',' | '"'))?)
            }
            other => return Err(self.bad(&format!("snapshots have no field `{other}`, seen"))),
        };
        let value = |c: char| c != ',' && c != '"';
        let test = if self.take("==") {
            Test::Equal(self.word(value)?)
        } else if self.take("!=") {
            Test::Unequal(self.word(value)?)
        } else if self.rest().is_empty() || self.rest().starts_with(',') {
            Test::Present
        } else {
            return Err(self.bad("`==`, `!=` or `,` expected"));
        };
        Ok(Condition { field, test })
    }

    /// A quoted string, or what `plain` takes.
    fn word(&mut self, plain: impl Fn(char) -> bool) -> Result<String, Error> {
        if !self.take("\"") {
            let end = self.rest().find(|c| !plain(c)).unwrap_or(self.rest().len());
            let word = &self.rest()[..end];
            self.at += end;
            return if word.is_empty() { Err(self.bad("a word expected")) } else { Ok(word.to_owned()) };
        }
        let mut word = String::new();
        let mut chars = self.rest().char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += at + 1;
                    return Ok(word);
                }
                '\\' => match chars.next() {
                    Some((_, escaped @ ('"' | '\\'))) => word.push(escaped),
                    _ => return Err(self.bad("an escape that is not known")),
                },
                c => word.push(c),
            }
        }
        Err(self.bad("a quote without end"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::Content;
    use crate::usage::Usage;

    fn snapshot() -> Snapshot {
        Snapshot {
            id: 1,
            key: "k8s.io/1/sha256:ab".into(),
            parent: None,
            kind: Kind::Committed,
            content: Content::Files,
            labels: BTreeMap::from([("containerd.io/snapshot.ref".into(), "sha256:ab".into())]),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage::default(),
        }
    }

    #[test]
    fn containerd_s_own_question_is_understood() {
        let passes = |text: &str| Filter::parse(text).unwrap().matches(&snapshot());
        assert!(passes(r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="""#));
        assert!(!passes(r#"labels."containerd.io/snapshot.ref"==sha256:cd,parent=="""#));
        assert!(!passes(r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="x""#));
        assert!(passes("kind==committed") && passes("kind!=View") && passes("name"));
        assert!(!passes("labels.nope") && !passes("parent") && passes("labels.nope!=x"));
        assert!(passes(""));
        for bad in
            ["kind", "size==1", "name=x", "name==\"x", "name==x,", "labels==x", r#"name=="\n""#, "name~=x"]
        {
            let result = Filter::parse(bad);
            assert!(result.is_err() == (bad != "kind"), "{bad}: {result:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in r#"[a-z."=!~,\\ é]{0,40}"#) {
            if let Ok(filter) = Filter::parse(&text) {
                let _ = filter.matches(&snapshot());
            }
        }
    }
}
