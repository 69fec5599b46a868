//! What a node tells of itself: spans of misses at a collector, the audit log, metrics by TCP.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

mod world;

use std::net::SocketAddr;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use skimmer_client::MountRequest;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use world::{World, drop_caches, until_ready};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

struct Collector(mpsc::UnboundedSender<Span>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let scopes =
            request.into_inner().resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        for span in scopes.flat_map(|scope| scope.spans) {
            let _ = self.0.send(span);
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (SocketAddr, mpsc::UnboundedReceiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (spans, received) = mpsc::unbounded_channel();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(spans)));
    tokio::spawn(server.serve_with_incoming(incoming));
    (address, received)
}

#[tokio::test(flavor = "multi_thread")]
async fn misses_become_spans_and_reads_are_written_down() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let (endpoint, mut spans) = collector().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = format!(
        "[traces]\nendpoint = 'http://{endpoint}'\nsample = 0.0\n[audit]\nfile = {:?}\n[metrics]\nlisten = '{free}'\n",
        world.path("audit/log.jsonl")
    );
    std::fs::write(world.path("config.toml"), config).unwrap();
    let client = world.start_daemon().await;
    // None is sampled by chance: these spans are there because the mount was asked for within a trace.
    let mut request = MountRequest::new(&image, world.path("mnt"));
    request.traceparent = Some(format!("00-{TRACE}-b7ad6b7169203331-01"));
    client.mount(&request).await.unwrap();
    world.assert_same("mnt");
    until_ready(&client).await;
    drop_caches();
    world.assert_same("mnt");

    let page = reqwest::get(format!("http://{free}/metrics")).await.unwrap().text().await.unwrap();
    assert!(page.contains("skimmer_mounts{mode=\"fanotify\"} 1"), "{page}");
    let other = reqwest::get(format!("http://{free}/v1/status")).await.unwrap();
    assert_eq!(other.status(), 404, "the control API is reached by TCP");

    client.umount(world.path("mnt"), false).await.unwrap();
    let audit = std::fs::read_to_string(world.path("audit/log.jsonl")).unwrap();
    let named =
        |name: &str| audit.lines().any(|line| line.contains(name) && line.contains("\"result\":\"miss\""));
    assert!(named("/deep/er/file5") && named("/file6"), "{audit}");
    for line in audit.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["images"][0], image, "{line}");
        assert!(line["length"].as_u64().unwrap() > 0 && line["at"].as_f64().unwrap() > 1.7e9, "{line}");
    }
    world.assert_all_gone(&client).await;

    // The end of the daemon sent what was left.
    let mut all = Vec::new();
    while let Ok(Some(span)) = tokio::time::timeout(Duration::from_secs(2), spans.recv()).await {
        all.push(span);
    }
    assert!(all.iter().all(|span| hex::encode(&span.trace_id) == TRACE), "{all:#?}");
    let misses: Vec<&Span> = all.iter().filter(|span| span.name == "miss").collect();
    assert!(!misses.is_empty(), "no miss was traced");
    let complete = misses.iter().filter(|miss| {
        let children = all.iter().filter(|span| span.parent_span_id == miss.span_id);
        let mut names: Vec<&str> = children
            .inspect(|child| {
                let within = child.start_time_unix_nano >= miss.start_time_unix_nano
                    && child.end_time_unix_nano <= miss.end_time_unix_nano;
                assert!(within, "{child:?} is not within {miss:?}");
            })
            .map(|child| child.name.as_str())
            .collect();
        names.sort_unstable();
        names == ["fetch", "queue", "verify", "write"]
    });
    assert!(complete.count() > 0, "no miss has all its stages: {all:#?}");
}
