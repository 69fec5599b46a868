//! The HTTP/1.1 side of the fault server.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use base64::Engine as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::{Bearer, Fault, Login, Request, Shared, State, TokenFault, lock};
use crate::digest::Digest;
use crate::oci::{Descriptor, Document};
use crate::source::BlobRef;

pub(super) async fn serve(listener: std::net::TcpListener, state: Shared) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        lock(&state).counts.connections += 1;
        let state = Shared::clone(&state);
        // Clients go away in the middle of things; that is their right.
        tokio::spawn(async move {
            let _ = connection(stream, state).await;
        });
    }
}

struct Incoming {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Incoming {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
}

/// Bodies are sent in pieces, so that a client that goes away early is noticed and counted right.
const PIECE: usize = 64 * 1024;

/// How a body ends.
#[derive(PartialEq)]
enum End {
    Right,
    Close,
    Stall,
}

struct Reply {
    code: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Overrides the length of the body in `Content-Length`.
    length: Option<u64>,
    chunked: bool,
    wait: Duration,
    /// Before each piece of the body.
    pause: Duration,
    end: End,
    /// A blob's bytes, to be counted.
    blob: bool,
}

impl Reply {
    fn new(code: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            code,
            headers: Vec::new(),
            body: body.into(),
            length: None,
            chunked: false,
            wait: Duration::ZERO,
            pause: Duration::ZERO,
            end: End::Right,
            blob: false,
        }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

async fn connection(stream: TcpStream, state: Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some(request) = receive(&mut stream).await? {
        let reply = respond(&state, &request);
        let mut logged = Request {
            range: request.header("range").map(str::to_owned),
            authorized: request.header("authorization").is_some(),
            accept_encoding: request.header("accept-encoding").map(str::to_owned),
            prefetch: request.header("x-dragonfly-prefetch") == Some("true"),
            method: request.method,
            target: request.target,
            status: 0,
        };
        let Some(reply) = reply else {
            lock(&state).log.push(logged);
            return Ok(());
        };
        logged.status = reply.code;
        let head_only = logged.method == "HEAD";
        {
            let mut state = lock(&state);
            state.log.push(logged);
            state.counts.requests += 1;
            state.waiting += 1;
            state.counts.most_at_once = state.counts.most_at_once.max(state.waiting);
        }
        tokio::time::sleep(reply.wait).await;
        lock(&state).waiting -= 1;
        let mut head = format!("HTTP/1.1 {} Reply\r\n", reply.code);
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if reply.chunked {
            head.push_str("transfer-encoding: chunked\r\n\r\n");
        } else {
            let length = reply.length.unwrap_or(u64::try_from(reply.body.len()).unwrap_or(0));
            head.push_str(&format!("content-length: {length}\r\n\r\n"));
        }
        stream.write_all(head.as_bytes()).await?;
        if head_only {
            continue;
        }
        for piece in reply.body.chunks(PIECE) {
            tokio::time::sleep(reply.pause).await;
            if reply.chunked {
                stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
            }
            stream.write_all(piece).await?;
            if reply.chunked {
                stream.write_all(b"\r\n").await?;
            }
            if reply.blob {
                lock(&state).counts.blob_bytes += u64::try_from(piece.len()).unwrap_or(0);
            }
        }
        match reply.end {
            End::Right if reply.chunked => stream.write_all(b"0\r\n\r\n").await?,
            End::Right => {}
            End::Close => return Ok(()),
            End::Stall => {
                // Until the client gives up.
                let mut byte = [0; 1];
                while stream.read(&mut byte).await? > 0 {}
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn receive(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Incoming>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let mut lines = lines.into_iter();
    let first = lines.next().unwrap_or_default();
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: Vec<_> = lines
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let mut request = Incoming { method, target, headers, body: Vec::new() };
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    request.body = vec![0; length];
    stream.read_exact(&mut request.body).await?;
    Ok(Some(request))
}

/// The reply, or `None` to close the connection.
fn respond(state: &Shared, request: &Incoming) -> Option<Reply> {
    let mut state = lock(state);
    let path = request.path();
    if path == "/token" {
        return Some(token(&mut state, request));
    }
    if let Some(digest) = path.strip_prefix("/storage/") {
        return blob(&mut state, request, digest);
    }
    if let Some(refusal) = refuse(&mut state, request) {
        return Some(refusal);
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return Some(Reply::new(404, "")) };
    if let Some((_, digest)) = rest.rsplit_once("/blobs/") {
        return blob(&mut state, request, digest);
    }
    if let Some((_, digest)) = rest.rsplit_once("/referrers/").filter(|_| state.referrers) {
        return Some(referrers(&state, digest));
    }
    match rest.rsplit_once("/manifests/") {
        Some((_, selector)) => Some(manifest(&state, selector)),
        None => Some(Reply::new(404, "")),
    }
}

/// Those of the layout's images whose `subject` is the manifest.
fn referrers(state: &State, digest: &str) -> Reply {
    let index = state.layout.index();
    let refers = |descriptor: &&Descriptor| {
        let Ok(Document::Manifest(manifest)) = state.layout.document(descriptor) else { return false };
        manifest.subject().as_ref().is_some_and(|subject| subject.digest().to_string() == digest)
    };
    let manifests: Vec<_> =
        index.iter().flat_map(|index| index.manifests().iter().filter(refers).cloned()).collect();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": crate::oci::MEDIA_TYPE_INDEX, "manifests": manifests,
    });
    Reply::new(200, index.to_string()).with("content-type", crate::oci::MEDIA_TYPE_INDEX)
}

/// The 401 for a request without the right `Authorization`.
fn refuse(state: &mut State, request: &Incoming) -> Option<Reply> {
    let shown = request.header("authorization");
    match &state.login {
        Login::Open => None,
        Login::Basic { user, password } => {
            let right = shown == Some(basic(user, password).as_str());
            (!right).then(|| Reply::new(401, "").with("www-authenticate", "Basic realm=\"test\""))
        }
        Login::Bearer(bearer) => {
            let now = Instant::now();
            let token = shown.and_then(|shown| shown.strip_prefix("Bearer "));
            let good = token.is_some_and(|token| {
                state.tokens.iter().any(|(known, until)| known == token && *until > now)
            });
            if good {
                return None;
            }
            let challenge = if bearer.basic_when_stale && shown.is_some() {
                "Basic realm=\"harbor\"".to_owned()
            } else {
                let first = if bearer.two_challenges { "Basic realm=\"a, b\", " } else { "" };
                format!(
                    "{first}Bearer realm=\"http://{}/token\",service=\"test\",scope=\"repository:a/b:pull,push\"",
                    state.address
                )
            };
            Some(Reply::new(401, "").with("www-authenticate", challenge))
        }
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

fn token(state: &mut State, request: &Incoming) -> Reply {
    state.counts.token_requests += 1;
    let Login::Bearer(bearer) = state.login.clone() else { return Reply::new(404, "") };
    let Bearer { password, identity, life, states_life, fault, .. } = bearer;
    let mut wait = Duration::ZERO;
    match &fault {
        Some(TokenFault::Down) => return Reply::new(503, "down").with("retry-after", "3"),
        Some(TokenFault::Redirect(to)) => return Reply::new(307, "").with("location", to),
        Some(TokenFault::Junk) => return Reply::new(200, "<html>log in</html>"),
        Some(TokenFault::Slow(time)) => wait = *time,
        Some(TokenFault::Worthless) | None => {}
    }
    if let Some(identity) = identity {
        let form = String::from_utf8_lossy(&request.body).into_owned();
        let right = request.method == "POST"
            && form.contains("grant_type=refresh_token")
            && form.contains(&format!("refresh_token={identity}"))
            && form.contains("scope=repository%3Aa%2Fb%3Apull%2Cpush");
        if !right {
            return Reply::new(401, "");
        }
    } else {
        let scoped = request.target.contains("service=test&scope=repository%3Aa%2Fb%3Apull%2Cpush");
        if request.method != "GET" || !scoped {
            return Reply::new(400, "");
        }
    }
    if let Some((user, password)) = password
        && request.header("authorization") != Some(basic(&user, &password).as_str())
    {
        return Reply::new(401, "");
    }
    let token = format!("t{}", state.counts.token_requests);
    if fault != Some(TokenFault::Worthless) {
        state.tokens.push((token.clone(), Instant::now() + life));
    }
    let mut document = serde_json::json!({ "token": token });
    if states_life {
        document["expires_in"] = life.as_secs().into();
    }
    let mut reply = Reply::new(200, document.to_string());
    reply.wait = wait;
    reply
}

fn manifest(state: &State, selector: &str) -> Reply {
    let digest = match selector.parse::<Digest>() {
        Ok(digest) => Some(digest),
        Err(_) => {
            let named = state.layout.resolve(Some(selector)).ok();
            let only = (selector == "latest").then(|| state.layout.resolve(None).ok()).flatten();
            named
                .or(only)
                .and_then(|descriptor| crate::oci::blob_ref(&descriptor).ok())
                .map(|blob| blob.digest)
        }
    };
    let bytes = digest.and_then(|digest| std::fs::read(state.layout.blob_path(&digest)).ok());
    let Some((bytes, digest)) = bytes.zip(digest) else {
        return Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#);
    };
    let raw = crate::oci::RawManifest::new(bytes, Some(crate::oci::MEDIA_TYPE_MANIFEST));
    Reply::new(200, raw.bytes)
        .with("content-type", raw.media_type)
        .with("docker-content-digest", digest.to_string())
}

fn parse_range(text: &str, size: u64) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let last: u64 = last.parse().ok()?;
    (first <= last && first < size).then(|| first..(last + 1).min(size))
}

fn blob(state: &mut State, request: &Incoming, digest: &str) -> Option<Reply> {
    let found = digest.parse::<Digest>().ok().and_then(|digest| {
        let size = std::fs::metadata(state.layout.blob_path(&digest)).ok()?.len();
        Some(BlobRef { digest, size })
    });
    let Some(blob) = found else {
        return Some(Reply::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}"#));
    };
    let size = blob.size;
    if request.method != "GET" {
        let mut reply = Reply::new(200, "");
        reply.length = Some(size);
        return Some(reply);
    }
    state.counts.blob_requests += 1;
    let fault = match &mut state.fault {
        None => None,
        Some((fault, None)) => Some(fault.clone()),
        Some((fault, Some(left))) => {
            let fault = fault.clone();
            *left -= 1;
            if *left == 0 {
                state.fault = None;
            }
            Some(fault)
        }
    };
    let all = std::fs::read(state.layout.blob_path(&blob.digest)).unwrap_or_default();
    let cut = |range: &Range<u64>| {
        let at = |byte: u64| usize::try_from(byte).unwrap_or(usize::MAX).min(all.len());
        all[at(range.start)..at(range.end)].to_vec()
    };
    let range = match request.header("range") {
        None => 0..size,
        Some(text) => match parse_range(text, size) {
            Some(range) => range,
            None => return Some(Reply::new(416, "")),
        },
    };
    let partial = |range: &Range<u64>, total: u64| {
        let mut reply = Reply::new(206, cut(range));
        reply.blob = true;
        reply.with("content-range", format!("bytes {}-{}/{total}", range.start, range.end.saturating_sub(1)))
    };
    let mut right =
        if request.header("range").is_some() { partial(&range, size) } else { Reply::new(200, cut(&range)) };
    right.blob = true;
    let length = range.end - range.start;
    let Some(fault) = fault else { return Some(right) };
    Some(match fault {
        Fault::Drop => return None,
        Fault::Status { code, headers, body } => {
            headers.iter().fold(Reply::new(code, body), |reply, (name, value)| reply.with(name, value))
        }
        Fault::IgnoreRange => Reply { blob: true, ..Reply::new(200, all) },
        Fault::OkWithRangeLength => Reply { blob: true, ..Reply::new(200, cut(&range)) },
        Fault::ShiftedRange => partial(&(range.start + 1..(range.end + 1).min(size)), size),
        Fault::ShortRange(most) => partial(&(range.start..range.end.min(range.start + most)), size),
        Fault::OverlongRange => partial(&(range.start..(range.end + 1).min(size)), size),
        Fault::OverlongBody => {
            right.chunked = true;
            right.body.extend_from_slice(&[0xEE; 100]);
            right
        }
        Fault::NoContentRange => Reply { blob: true, ..Reply::new(206, cut(&range)) },
        Fault::TwoContentRanges => {
            let header = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            right.with("content-range", header)
        }
        Fault::WrongTotal => partial(&range, size + 1),
        Fault::Multipart => right.with("content-type", "multipart/byteranges; boundary=x"),
        Fault::GzipEncoding => right.with("content-encoding", "gzip"),
        Fault::Truncate(after) | Fault::Stall(after) => {
            let end = if matches!(fault, Fault::Stall(_)) { End::Stall } else { End::Close };
            right.body.truncate(usize::try_from(after.min(length)).unwrap_or(0));
            Reply { length: Some(length), end, ..right }
        }
        Fault::SlowFirstByte(wait) => Reply { wait, ..right },
        Fault::Slow(rate) => {
            let pause =
                Duration::from_secs(1).saturating_mul(u32::try_from(PIECE).unwrap_or(u32::MAX)) / rate.max(1);
            Reply { pause, ..right }
        }
        Fault::HugeErrorLength => {
            Reply { length: Some(64 << 20), end: End::Stall, ..Reply::new(416, [b'x'; 33]) }
        }
        Fault::WrongBytes => {
            right.body.iter_mut().for_each(|byte| *byte ^= 0x10);
            right
        }
        Fault::Redirect { code, location } => {
            Reply::new(code, "").with("location", location.replace("{digest}", &blob.digest.to_string()))
        }
    })
}
