//! The `WWW-Authenticate` header (RFC 9110, section 11.6.1).

/// What a server wants to see in `Authorization`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    /// The scheme, lowercase.
    pub(crate) scheme: String,
    /// Parameters in their order, names lowercase.
    pub(crate) params: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of that name.
    pub(crate) fn param(&self, name: &str) -> Option<&str> {
        self.params.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Most challenges of one header that are read.
const MAX_CHALLENGES: usize = 16;
/// Most parameters of one challenge that are read.
const MAX_PARAMS: usize = 32;

/// Reads all challenges of one header. What cannot be read ends the list.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = Cursor(header);
    loop {
        rest.skip(|c| c == ',' || c.is_ascii_whitespace());
        let Some(word) = rest.token() else { return found };
        // `name = value` continues the challenge before it; another word starts one.
        match rest.clone().value() {
            Some((value, after)) if !found.is_empty() => {
                rest = after;
                if let Some(challenge) = found.last_mut()
                    && challenge.params.len() < MAX_PARAMS
                {
                    challenge.params.push((word.to_ascii_lowercase(), value));
                }
            }
            Some(_) => return found,
            None => {
                if found.len() == MAX_CHALLENGES {
                    return found;
                }
                found.push(Challenge { scheme: word.to_ascii_lowercase(), params: Vec::new() });
                rest.skip_token68();
            }
        }
    }
}

#[derive(Clone)]
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn skip(&mut self, what: impl Fn(char) -> bool) {
        self.0 = self.0.trim_start_matches(what);
    }

    fn token(&mut self) -> Option<&'a str> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        let end = self.0.find(|c| !is_token(c)).unwrap_or(self.0.len());
        let (token, rest) = self.0.split_at(end);
        self.0 = rest;
        (!token.is_empty()).then_some(token)
    }

    /// `= token` or `= "quoted"` at this place, and what follows it.
    fn value(mut self) -> Option<(String, Self)> {
        self.skip(|c| c.is_ascii_whitespace());
        self.0 = self.0.strip_prefix('=')?;
        self.skip(|c| c.is_ascii_whitespace());
        let Some(quoted) = self.0.strip_prefix('"') else {
            let value = self.token()?.to_owned();
            return Some((value, self));
        };
        let mut value = String::new();
        let mut chars = quoted.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => return Some((value, Cursor(&quoted[at + 1..]))),
                '\\' => value.push(chars.next()?.1),
                c => value.push(c),
            }
        }
        None
    }

    /// Skips the one blob of schemes like Negotiate: letters, digits, `-._~+/` and `=` at the end.
    fn skip_token68(&mut self) {
        let mut ahead = self.clone();
        ahead.skip(|c| c.is_ascii_whitespace());
        let is_blob = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
        let end = ahead.0.find(|c| !is_blob(c)).unwrap_or(ahead.0.len());
        let mut after = Cursor(&ahead.0[end..]);
        after.skip(|c| c == '=');
        let at_end = after.0.trim_start();
        if end > 0 && (at_end.is_empty() || at_end.starts_with(',')) {
            *self = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn challenge(scheme: &str, params: &[(&str, &str)]) -> Challenge {
        let params = params.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Challenge { scheme: scheme.to_owned(), params }
    }

    #[test]
    fn real_headers() {
        assert_eq!(
            parse(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
            ),
            [challenge(
                "bearer",
                &[
                    ("realm", "https://auth.docker.io/token"),
                    ("service", "registry.docker.io"),
                    ("scope", "repository:a/b:pull,push"),
                ]
            )]
        );
        assert_eq!(parse(r#"Basic realm="harbor""#), [challenge("basic", &[("realm", "harbor")])]);
        assert_eq!(
            parse(r#"Negotiate abc==, BASIC realm = "a \"b\" \\", Bearer realm=x , error="invalid_token""#),
            [
                challenge("negotiate", &[]),
                challenge("basic", &[("realm", r#"a "b" \"#)]),
                challenge("bearer", &[("realm", "x"), ("error", "invalid_token")]),
            ]
        );
        assert_eq!(parse("Negotiate, Basic realm=x").len(), 2);
    }

    #[test]
    fn broken_headers() {
        assert_eq!(parse(""), []);
        assert_eq!(parse("=x"), []);
        assert_eq!(parse(r#"realm="x""#), []);
        assert_eq!(parse(r#"Bearer realm="open"#), [challenge("bearer", &[]), challenge("realm", &[])]);
    }

    proptest! {
        #[test]
        fn any_text_is_handled(text in "\\PC{0,200}") {
            let found = parse(&text);
            prop_assert!(found.len() <= MAX_CHALLENGES);
        }

        #[test]
        fn quoted_values_survive(
            challenges in proptest::collection::vec(
                ("[A-Za-z]{1,8}", proptest::collection::vec(("[a-z]{1,8}", "[ -~]{0,20}"), 1..4)), 1..4)
        ) {
            let text: Vec<String> = challenges.iter().map(|(scheme, params)| {
                let params: Vec<_> = params.iter()
                    .map(|(key, value)| format!("{key}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")))
                    .collect();
                format!("{scheme} {}", params.join(","))
            }).collect();
            let expected: Vec<_> = challenges.into_iter()
                .map(|(scheme, params)| Challenge { scheme: scheme.to_ascii_lowercase(), params })
                .collect();
            prop_assert_eq!(parse(&text.join(", ")), expected);
        }
    }
}
