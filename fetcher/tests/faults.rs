//! Every way in which a registry may be wrong: what comes of it, and that nothing unverified is handed over.

#![allow(clippy::unwrap_used)] // test code, though not in a test function

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{ALL_CODECS, Sample, options, registry, sample};
use skimmer_fetcher::chunk::{ChunkError, ChunkSpec, Codec, FetchError, fetch};
use skimmer_fetcher::credentials::{Credential, Credentials, Logins, Secret};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::registry::{Registry, RegistryOptions};
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, SourceError, Urgency};
use skimmer_fetcher::testing::{Bearer, Fault, FaultServer, Login, TokenFault};

struct World {
    sample: Sample,
    server: FaultServer,
    registry: Registry,
}

fn world(change: impl FnOnce(&FaultServer, &mut RegistryOptions)) -> World {
    let sample = sample(&ALL_CODECS);
    let server = FaultServer::start(sample.layout.clone()).unwrap();
    let mut options = options();
    options.http.timeouts.first_byte = Duration::from_millis(600);
    options.http.timeouts.connect = Duration::from_millis(600);
    options.http.timeouts.idle = Duration::from_millis(400);
    change(&server, &mut options);
    let registry = registry(&server.host(), &options);
    World { sample, server, registry }
}

impl World {
    /// Fetches all chunks from `first` on; every one that is handed over must be right.
    async fn fetch_from(&self, first: usize) -> (usize, Result<(), FetchError>) {
        let plan: Vec<(ChunkSpec, Vec<u8>)> = self.sample.chunks[first..]
            .iter()
            .map(|(spec, data)| (*spec, vec![0xAA; data.len().next_multiple_of(4096)]))
            .collect();
        let mut came = 0;
        let result = fetch(&self.registry, &self.sample.blob, plan, |at, verified| {
            assert!(verified.bytes() == self.sample.chunks[first + at].1, "chunk {at} is wrong");
            came += 1;
        })
        .await;
        (came, result)
    }

    async fn source_error(&self, first: usize) -> SourceError {
        match self.fetch_from(first).await {
            (_, Err(FetchError::Source(error))) => error,
            other => panic!("expected a failure of the source, got {other:?}"),
        }
    }
}

fn status(code: u16, headers: &[(&str, &str)]) -> Fault {
    let headers = headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Fault::Status { code, headers, body: br#"{"errors":[{"code":"X","message":"because"}]}"#.to_vec() }
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_against_the_protocol() {
    let mut world = world(|_, _| {});
    for (fault, first, class) in [
        (Fault::IgnoreRange, 3, ErrorClass::NoRanges),
        (Fault::OkWithRangeLength, 3, ErrorClass::BadReply),
        (Fault::ShiftedRange, 3, ErrorClass::BadReply),
        (Fault::ShiftedRange, 0, ErrorClass::BadReply),
        (Fault::NoContentRange, 0, ErrorClass::BadReply),
        (Fault::TwoContentRanges, 0, ErrorClass::BadReply),
        (Fault::WrongTotal, 0, ErrorClass::BadReply),
        (Fault::Multipart, 0, ErrorClass::BadReply),
        (Fault::GzipEncoding, 0, ErrorClass::BadReply),
        (Fault::HugeErrorLength, 0, ErrorClass::BadRange),
        (Fault::ShortRange(1000), 0, ErrorClass::BadReply),
        (status(204, &[]), 0, ErrorClass::BadReply),
        (status(302, &[]), 0, ErrorClass::BadReply),
        (status(304, &[]), 0, ErrorClass::BadReply),
        (status(400, &[]), 0, ErrorClass::BadReply),
        (status(401, &[]), 0, ErrorClass::Denied),
        (status(403, &[]), 0, ErrorClass::Denied),
        (status(404, &[]), 0, ErrorClass::NotFound),
        (status(410, &[]), 0, ErrorClass::NotFound),
        (status(416, &[]), 0, ErrorClass::BadRange),
        (status(408, &[]), 0, ErrorClass::Transient),
        (status(500, &[]), 0, ErrorClass::Transient),
        (status(503, &[]), 0, ErrorClass::Transient),
    ] {
        // Each with a fresh client: a host that ignored a range is not asked again for a while.
        world.registry = registry(&world.server.host(), &options());
        world.server.fault(fault.clone());
        let error = world.source_error(first).await;
        assert_eq!(error.class, class, "{fault:?}: {error}");
        let text = error.to_string();
        assert!(text.contains(&world.server.host()), "{text}");
        assert!(text.contains(&world.sample.blob.digest.hex()), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_past_the_request_is_refused() {
    let world = world(|_, _| {});
    world.server.fault(Fault::OverlongRange);
    let error = world.registry.read(&world.sample.blob, 100..200, Urgency::Demand).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::BadReply, "{error}");
    world.server.fault(Fault::OverlongBody);
    let body = world.registry.read(&world.sample.blob, 100..200, Urgency::Demand).await.unwrap();
    assert_eq!(body.collect().await.unwrap_err().class, ErrorClass::BadReply);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_still_gives_the_front() {
    let world = world(|_, _| {});
    world.server.fault(Fault::IgnoreRange);
    let (came, result) = world.fetch_from(0).await;
    result.unwrap();
    assert_eq!(came, world.sample.chunks.len());
    // Only the front is taken; the rest is not drained.
    world.server.take_log();
    let body = world.registry.read(&world.sample.blob, 0..10, Urgency::Demand).await.unwrap();
    assert_eq!(body.collect().await.unwrap().len(), 10);
    // Once it is known, the server is not asked for what it will not give.
    assert_eq!(world.source_error(3).await.class, ErrorClass::NoRanges);
    let asked = world.server.counts().blob_requests;
    assert_eq!(world.source_error(3).await.class, ErrorClass::NoRanges);
    assert_eq!(world.server.counts().blob_requests, asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_ranges_are_put_together() {
    let world = world(|_, _| {});
    let size = world.sample.blob.size;
    world.server.fault(Fault::ShortRange(size / 4 + 1));
    let (came, result) = world.fetch_from(0).await;
    result.unwrap();
    assert_eq!(came, world.sample.chunks.len());
    assert_eq!(world.server.counts().blob_requests, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_and_stalled_bodies_keep_what_came() {
    let world = world(|_, _| {});
    let half = world.sample.chunks[11].0.stored_offset + 1;
    for fault in [Fault::Truncate(half), Fault::Stall(half)] {
        world.server.fault(fault.clone());
        let (came, result) = world.fetch_from(0).await;
        let Err(FetchError::Source(error)) = result else { panic!("{fault:?}: {result:?}") };
        assert_eq!(error.class, ErrorClass::Transient, "{fault:?}: {error}");
        assert_eq!(came, 11, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_bounded() {
    let world = world(|_, _| {});
    world.server.fault(Fault::SlowFirstByte(Duration::from_secs(60)));
    assert_eq!(world.source_error(0).await.class, ErrorClass::Transient);
    world.server.fault(Fault::SlowFirstByte(Duration::from_millis(100)));
    world.fetch_from(0).await.1.unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let dead = registry(&nobody, &options());
    assert_eq!(
        dead.read(&world.sample.blob, 0..1, Urgency::Demand).await.unwrap_err().class,
        ErrorClass::Transient
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_connection_may_pass() {
    let world = world(|_, _| {});
    world.fetch_from(0).await.1.unwrap();
    // The pooled connection is closed instead of an answer to its second request.
    world.server.fault_times(Fault::Drop, 1);
    match world.fetch_from(0).await {
        (_, Ok(())) => {}
        (_, Err(FetchError::Source(error))) => assert_eq!(error.class, ErrorClass::Transient, "{error}"),
        (_, Err(error)) => panic!("{error}"),
    }
    world.fetch_from(0).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_told() {
    let world = world(|_, _| {});
    world.server.fault(status(429, &[("retry-after", "7")]));
    let error = world.source_error(0).await;
    assert_eq!((error.class, error.retry_after), (ErrorClass::Transient, Some(Duration::from_secs(7))));
    assert!(error.to_string().contains("because"), "{error}");
    let date = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(100));
    world.server.fault(status(503, &[("retry-after", &date)]));
    let after = world.source_error(0).await.retry_after.unwrap();
    assert!((80..=100).contains(&after.as_secs()), "{after:?}");
    world.server.fault(status(404, &[("retry-after", "7")]));
    assert_eq!(world.source_error(0).await.retry_after, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_never_come_out() {
    let world = world(|_, _| {});
    world.server.fault(Fault::WrongBytes);
    let (came, result) = world.fetch_from(0).await;
    assert_eq!(came, 0);
    let Err(FetchError::Chunk { place, error }) = result else { panic!("{result:?}") };
    assert_eq!(place.index, 0);
    assert!(matches!(error, ChunkError::Digest { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_chunk_spoils_no_other() {
    let world = world(|_, _| {});
    for wrong in [0, 9, 21] {
        let mut plan: Vec<(ChunkSpec, Vec<u8>)> =
            world.sample.chunks.iter().map(|(spec, data)| (*spec, vec![0; data.len()])).collect();
        plan[wrong].0.digest = skimmer_fetcher::chunk::ChunkDigest::Sha256([7; 32]);
        let mut came = Vec::new();
        let result = fetch(&world.registry, &world.sample.blob, plan, |at, _| came.push(at)).await;
        let Err(FetchError::Chunk { place, .. }) = result else { panic!("{result:?}") };
        assert_eq!(place.index, wrong);
        came.sort_unstable();
        let others: Vec<_> = (0..22).filter(|at| *at != wrong).collect();
        assert_eq!(came, others);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_plans_ask_for_nothing() {
    let world = world(|_, _| {});
    let spec = |at: usize| world.sample.chunks[at].0;
    let buffer = |at: usize| vec![0u8; world.sample.chunks[at].1.len()];
    let past = ChunkSpec { stored_offset: world.sample.blob.size - 1, ..spec(3) };
    for plan in [
        vec![(spec(3), buffer(3)), (spec(2), buffer(2))],
        vec![(spec(3), buffer(3)), (spec(3), buffer(3))],
        vec![(spec(3), buffer(3)[1..].to_vec())],
        vec![(past, buffer(3))],
        vec![(ChunkSpec { codec: Codec::None, stored_len: 1, ..spec(3) }, buffer(3))],
    ] {
        let result = fetch(&world.registry, &world.sample.blob, plan, |_, _| panic!("no chunk")).await;
        assert!(matches!(result, Err(FetchError::Plan(_))), "{result:?}");
    }
    assert_eq!(world.server.counts().requests, 0);
}

fn redirect(code: u16, location: impl Into<String>) -> Fault {
    Fault::Redirect { code, location: location.into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_and_remembered() {
    let mut world = world(|server, _| {
        server.login(Login::Basic { user: "u".into(), password: "p".into() });
    });
    let mut options = options();
    options.credentials = Credentials::anonymous().with_password(&world.server.host(), "u", Secret::new("p"));
    let storage = FaultServer::start(world.sample.layout.clone()).unwrap();
    let target = format!("http://{}/storage/{{digest}}?sig=hidden", storage.host());
    for code in [301, 302, 303, 307, 308] {
        world.registry = registry(&world.server.host(), &options);
        world.server.fault(redirect(code, &target));
        world.server.take_log();
        storage.take_log();
        world.fetch_from(3).await.1.unwrap();
        world.fetch_from(5).await.1.unwrap();
        let log = world.server.take_log();
        // One without and one with the password; the second range goes to the target at once.
        assert_eq!(log.iter().map(|request| request.authorized).collect::<Vec<_>>(), [false, true], "{code}");
        let log = storage.take_log();
        assert_eq!(log.len(), 2, "{code}");
        for request in log {
            assert!(!request.authorized, "the storage saw our password: {request:?}");
            assert!(request.range.is_some_and(|range| range.starts_with("bytes=")));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relative_redirect_is_resolved() {
    let world = world(|_, _| {});
    world.server.fault_times(redirect(307, "/storage/{digest}"), 1);
    world.fetch_from(0).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_expires_is_asked_for_again() {
    let world = world(|_, _| {});
    let storage = FaultServer::start(world.sample.layout.clone()).unwrap();
    let target = redirect(307, format!("http://{}/storage/{{digest}}", storage.host()));
    world.server.fault(target);
    world.fetch_from(3).await.1.unwrap();
    // The signature ends: the target says 403 once, the registry gives a new one.
    storage.fault_times(status(403, &[]), 1);
    world.fetch_from(3).await.1.unwrap();
    assert_eq!(world.server.counts().blob_requests, 2);
    // From a fresh target the same status is real.
    storage.fault(status(403, &[]));
    let error = world.source_error(3).await;
    assert_eq!(error.class, ErrorClass::Denied, "{error}");
    // A dead target is not stuck to either.
    storage.honest();
    world.fetch_from(3).await.1.unwrap();
    drop(storage);
    world.server.honest();
    world.fetch_from(3).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_redirects_are_refused() {
    let world = world(|_, _| {});
    for (fault, class, word) in [
        (redirect(307, "/v2/a/b/blobs/{digest}"), ErrorClass::BadReply, "redirects"),
        (redirect(307, "http://registry.example/x"), ErrorClass::BadReply, "plain http"),
        (redirect(307, "ftp://127.0.0.1/x"), ErrorClass::BadReply, "ftp"),
        (redirect(307, "http://u:p@127.0.0.1/x"), ErrorClass::BadReply, "user name"),
    ] {
        world.server.fault(fault.clone());
        let error = world.source_error(0).await;
        assert_eq!(error.class, class, "{fault:?}: {error}");
        assert!(error.to_string().contains(word), "{fault:?}: {error}");
        // What was refused must not be remembered.
        world.server.honest();
        world.fetch_from(0).await.1.unwrap();
    }
}

fn bearer(bearer: Bearer) -> Login {
    Login::Bearer(bearer)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_every_kind() {
    let password = || Some(("u".to_owned(), "p:q".to_owned()));
    for (kind, credentials) in [
        (Bearer::default(), None),
        (Bearer { password: password(), ..Bearer::default() }, Some("u:p:q")),
        (Bearer { password: password(), two_challenges: true, ..Bearer::default() }, Some("u:p:q")),
        (Bearer { states_life: false, ..Bearer::default() }, None),
    ] {
        let world = world(|server, options| {
            server.login(bearer(kind.clone()));
            if let Some(text) = credentials {
                options.credentials =
                    Credentials::anonymous().with_user_password(&server.host(), text).unwrap();
            }
        });
        world.fetch_from(0).await.1.unwrap();
        world.fetch_from(3).await.1.unwrap();
        assert_eq!(world.server.counts().token_requests, 1, "{kind:?}");
        // A token that no longer counts is replaced without the caller's knowledge.
        world.server.revoke_tokens();
        world.fetch_from(3).await.1.unwrap();
        assert_eq!(world.server.counts().token_requests, 2, "{kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_posted() {
    let dir = tempfile::tempdir().unwrap();
    let world = world(|server, options| {
        server.login(bearer(Bearer { identity: Some("idtok".into()), ..Bearer::default() }));
        let path = dir.path().join("config.json");
        let text = serde_json::json!({"auths": { (server.host()): {"identitytoken": "idtok"} }});
        std::fs::write(&path, text.to_string()).unwrap();
        options.credentials = Credentials::from_files(vec![path]);
    });
    world.fetch_from(0).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_token_answered_by_basic_alone() {
    let world = world(|server, _| {
        server.login(bearer(Bearer { basic_when_stale: true, ..Bearer::default() }));
    });
    world.fetch_from(0).await.1.unwrap();
    world.server.revoke_tokens();
    world.fetch_from(0).await.1.unwrap();
    assert_eq!(world.server.counts().token_requests, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_lived_tokens_are_renewed() {
    let world = world(|server, _| {
        server.login(bearer(Bearer { life: Duration::from_secs(1), ..Bearer::default() }));
    });
    for _ in 0..4 {
        world.fetch_from(10).await.1.unwrap();
        tokio::time::sleep(Duration::from_millis(450)).await;
    }
    let refused = world.server.take_log().iter().filter(|request| request.status == 401).count();
    let refused = u64::try_from(refused).unwrap();
    assert!(refused < world.server.counts().token_requests, "no token was renewed before its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_share_one_token() {
    let world = world(|server, options| {
        options.http.timeouts.first_byte = Duration::from_secs(10);
        let fault = Some(TokenFault::Slow(Duration::from_millis(300)));
        server.login(bearer(Bearer { fault, ..Bearer::default() }));
    });
    let reads = (0..20).map(|at| {
        let (registry, blob) = (world.registry.clone(), world.sample.blob);
        tokio::spawn(async move { registry.read(&blob, at..at + 10, Urgency::Demand).await?.collect().await })
    });
    let reads: Vec<_> = reads.collect();
    // The first, who began the fetch of the token, goes away.
    reads[0].abort();
    for read in reads.into_iter().skip(1) {
        read.await.unwrap().unwrap();
    }
    assert_eq!(world.server.counts().token_requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn token_endpoints_that_fail() {
    let elsewhere = FaultServer::start(sample(&[Codec::None]).layout).unwrap();
    let away = TokenFault::Redirect(format!("http://{}/token", elsewhere.host()));
    for (fault, class, requests) in [
        (TokenFault::Down, ErrorClass::Transient, 1),
        (away, ErrorClass::BadReply, 1),
        (TokenFault::Redirect("/token".into()), ErrorClass::BadReply, 4),
        (TokenFault::Junk, ErrorClass::BadReply, 1),
        (TokenFault::Slow(Duration::from_secs(60)), ErrorClass::Transient, 1),
        (TokenFault::Worthless, ErrorClass::Denied, 3),
    ] {
        let world = world(|server, options| {
            server.login(bearer(Bearer { fault: Some(fault.clone()), ..Bearer::default() }));
            options.credentials =
                Credentials::anonymous().with_password(&server.host(), "u", Secret::new("hush"));
        });
        let error = world.source_error(0).await;
        assert_eq!(error.class, class, "{fault:?}: {error}");
        assert!(!error.to_string().contains("hush"), "{error}");
        assert_eq!(world.server.counts().token_requests, requests, "{fault:?}");
        if fault == TokenFault::Down {
            assert_eq!(error.retry_after, Some(Duration::from_secs(3)));
        }
    }
    assert_eq!(elsewhere.counts().requests, 0, "our password was sent to another host");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_read_is_told_so() {
    let user = Login::Basic { user: "u".into(), password: "p".into() };
    for login in [user, bearer(Bearer { password: Some(("u".into(), "p".into())), ..Bearer::default() })] {
        let world = world(|server, options| {
            server.login(login.clone());
            options.credentials =
                Credentials::anonymous().with_password(&server.host(), "u", Secret::new("wrong"));
        });
        let error = world.source_error(0).await;
        assert_eq!(error.class, ErrorClass::Denied, "{error}");
        assert!(!format!("{error} {:?}", world.registry).contains("wrong"), "{error}");
        let nobody = registry(&world.server.host(), &options());
        let error = nobody.read(&world.sample.blob, 0..1, Urgency::Demand).await.unwrap_err();
        assert_eq!(error.class, ErrorClass::Denied, "{error}");
    }
}

/// A good login, and one that somebody is trying.
struct Known {
    good: &'static str,
    tried: &'static str,
}

impl Logins for Known {
    fn login(&self, _: &str, _: &str, refused: bool) -> Option<Credential> {
        let password = Secret::new(if refused { self.tried } else { self.good });
        Some(Credential::Password { user: "u".into(), password })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_login_is_shown_only_after_a_refusal() {
    let user = Login::Basic { user: "u".into(), password: "p".into() };
    for login in [user, bearer(Bearer { password: Some(("u".into(), "p".into())), ..Bearer::default() })] {
        for (good, tried) in [("p", "wrong"), ("old", "p")] {
            let world = world(|server, options| {
                server.login(login.clone());
                options.credentials = Credentials::anonymous().with_logins(Arc::new(Known { good, tried }));
            });
            let source: &dyn Source = &world.registry;
            assert!(source.read(&world.sample.blob, 0..1, Urgency::Demand).await.is_ok(), "{good} {tried}");
        }
        let world = world(|server, options| {
            server.login(login.clone());
            options.credentials =
                Credentials::anonymous().with_logins(Arc::new(Known { good: "old", tried: "wrong" }));
        });
        assert_eq!(world.source_error(0).await.class, ErrorClass::Denied);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_program_that_fails_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let world = world(|server, options| {
        server.login(Login::Basic { user: "u".into(), password: "p".into() });
        let path = dir.path().join("config.json");
        std::fs::write(&path, r#"{"credsStore": "absent"}"#).unwrap();
        options.credentials =
            Credentials::from_files(vec![path]).with_helpers(dir.path(), Duration::from_millis(500));
    });
    let error = world.source_error(0).await;
    assert_eq!(error.class, ErrorClass::Denied);
    assert!(error.to_string().contains("docker-credential-absent"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_are_verified() {
    let world = world(|_, _| {});
    let digest = world.sample.manifest;
    assert_eq!(world.registry.manifest("v1").await.unwrap().digest, digest);
    let path = world.sample.layout.blob_path(&digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.push(b' ');
    std::fs::write(&path, &bytes).unwrap();
    let error = world.registry.manifest(&digest.to_string()).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::Corrupt, "{error}");
    // By tag there is no digest to hold against it but the sender's own.
    assert_eq!(world.registry.manifest("v1").await.unwrap_err().class, ErrorClass::BadReply);
    let huge = vec![b' '; (4 << 20) + 1];
    std::fs::write(&path, huge).unwrap();
    let error = world.registry.manifest("v1").await.unwrap_err();
    assert!(error.to_string().contains("larger than"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_that_differs_is_noticed() {
    let world = world(|_, _| {});
    let lie = BlobRef { size: world.sample.blob.size - 1, ..world.sample.blob };
    assert_eq!(world.registry.has(&lie).await.unwrap_err().class, ErrorClass::BadReply);
    assert_eq!(
        world.registry.read(&lie, 5..9, Urgency::Demand).await.unwrap_err().class,
        ErrorClass::BadReply
    );
    let absent = BlobRef { digest: Digest::of(b"?"), size: 1 };
    assert!(!world.registry.has(&absent).await.unwrap());
}
