//! A registry on loopback that serves a layout, counts what it is asked, and misbehaves on request.
//!
//! For tests only (feature `testing`). It runs on a thread of its own, so that it serves synchronous tests
//! as well, and it writes HTTP/1.1 itself: most of what it must do, no server library would.

mod server;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::layout::Layout;

/// A way to misbehave, for replies to GET of blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Any status, with headers and a body.
    Status {
        /// The status code.
        code: u16,
        /// Headers besides the length.
        headers: Vec<(String, String)>,
        /// The body.
        body: Vec<u8>,
    },
    /// 200 and the whole blob, whatever range was asked.
    IgnoreRange,
    /// 200 with the length of the range instead of the blob's.
    OkWithRangeLength,
    /// 206 whose `Content-Range` and bytes begin one byte later than asked.
    ShiftedRange,
    /// 206 with at most so many bytes, and a `Content-Range` that says so.
    ShortRange(u64),
    /// 206 with more bytes than were asked for, and a `Content-Range` that says so.
    OverlongRange,
    /// 206 with the right `Content-Range`, but chunked and with more bytes.
    OverlongBody,
    /// 206 without `Content-Range`.
    NoContentRange,
    /// 206 with two `Content-Range` headers.
    TwoContentRanges,
    /// 206 whose `Content-Range` has another total.
    WrongTotal,
    /// 206 as `multipart/byteranges`.
    Multipart,
    /// 206 with `Content-Encoding: gzip`.
    GzipEncoding,
    /// A right reply whose body is cut after so many bytes.
    Truncate(u64),
    /// A right reply whose body stops after so many bytes, with the connection open.
    Stall(u64),
    /// A right reply after a wait.
    SlowFirstByte(Duration),
    /// A right reply at this many bytes a second.
    Slow(u32),
    /// 416 with a `Content-Length` of 64 MiB and a body of 33 bytes, as docker-registry 2.8.2 sends it.
    HugeErrorLength,
    /// A right reply in which one bit of each byte is wrong.
    WrongBytes,
    /// The connection is closed instead of a reply.
    Drop,
    /// A redirect. `{digest}` in the target stands for the blob's digest.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        code: u16,
        /// The `Location`.
        location: String,
    },
}

/// Who may read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// Anyone.
    Open,
    /// User and password by Basic.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A token from this server's `/token`.
    Bearer(Bearer),
}

/// How tokens are given out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// User and password that the token endpoint wants by Basic.
    pub password: Option<(String, String)>,
    /// Identity token that the token endpoint wants by POST.
    pub identity: Option<String>,
    /// How long a token is good.
    pub life: Duration,
    /// Whether the reply has `expires_in`.
    pub states_life: bool,
    /// Whether the challenge comes second, after a Basic one in the same header.
    pub two_challenges: bool,
    /// Whether a stale token is answered by a Basic challenge alone (Harbor 2.5).
    pub basic_when_stale: bool,
    /// How the token endpoint misbehaves.
    pub fault: Option<TokenFault>,
}

impl Default for Bearer {
    fn default() -> Self {
        Self {
            password: None,
            identity: None,
            life: Duration::from_secs(300),
            states_life: true,
            two_challenges: false,
            basic_when_stale: false,
            fault: None,
        }
    }
}

/// A way for the token endpoint to misbehave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenFault {
    /// 503.
    Down,
    /// Waits before it answers.
    Slow(Duration),
    /// Redirects.
    Redirect(String),
    /// Answers something that is no JSON.
    Junk,
    /// Gives tokens that the registry then refuses.
    Worthless,
}

/// A request that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` and so on.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// Whether there was an `Authorization` header.
    pub authorized: bool,
    /// The `Accept-Encoding` header.
    pub accept_encoding: Option<String>,
    /// Whether `X-Dragonfly-Prefetch` was true.
    pub prefetch: bool,
    /// The status of the reply; 0 when none was sent.
    pub status: u16,
}

/// What the server has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted.
    pub connections: u64,
    /// Requests received.
    pub requests: u64,
    /// GET requests for blobs.
    pub blob_requests: u64,
    /// Bytes of bodies sent for them.
    pub blob_bytes: u64,
    /// Requests to the token endpoint.
    pub token_requests: u64,
    /// Requests that waited for their reply at the same time, at most.
    pub most_at_once: u64,
}

struct State {
    layout: Layout,
    address: SocketAddr,
    fault: Option<(Fault, Option<u64>)>,
    login: Login,
    referrers: bool,
    tokens: Vec<(String, Instant)>,
    log: Vec<Request>,
    counts: Counts,
    /// Requests that wait for their reply now.
    waiting: u64,
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running server. Dropping it ends it.
pub struct FaultServer {
    state: Shared,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FaultServer {
    /// Serves a layout under any repository name; the tag `latest` is the layout's only image when it has
    /// none of that name.
    pub fn start(layout: Layout) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State {
            layout,
            address,
            fault: None,
            login: Login::Open,
            referrers: false,
            tokens: Vec::new(),
            log: Vec::new(),
            counts: Counts::default(),
            waiting: 0,
        }));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("fault-registry".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = server::serve(listener, shared) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { state, address, stop: Some(stop), thread: Some(thread) })
    }

    /// `127.0.0.1:PORT`, the host of image names.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Serves another layout from now on.
    pub fn serve(&self, layout: Layout) {
        lock(&self.state).layout = layout;
    }

    /// Misbehaves from now on.
    pub fn fault(&self, fault: Fault) {
        lock(&self.state).fault = Some((fault, None));
    }

    /// Misbehaves for the next `count` requests.
    pub fn fault_times(&self, fault: Fault, count: u64) {
        lock(&self.state).fault = (count > 0).then_some((fault, Some(count)));
    }

    /// Behaves again.
    pub fn honest(&self) {
        lock(&self.state).fault = None;
    }

    /// Sets who may read.
    pub fn login(&self, login: Login) {
        lock(&self.state).login = login;
    }

    /// Whether it has the referrers API from now on.
    pub fn referrers(&self, has: bool) {
        lock(&self.state).referrers = has;
    }

    /// Makes all tokens given out so far invalid.
    pub fn revoke_tokens(&self) {
        lock(&self.state).tokens.clear();
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    /// The requests so far, and forgets them.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.state).log)
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The thread may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}
