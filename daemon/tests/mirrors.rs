//! A mounted image of a registry whose mirrors are bad: every byte comes right, and nobody waits long.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

mod world;

use std::time::Duration;

use skimmer_client::{MountRequest, PrefetchRequest};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::testing::{Fault, FaultServer};
use world::{World, content, drop_caches, until_ready};

#[tokio::test(flavor = "multi_thread")]
async fn bad_mirrors_cost_no_byte() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    world.pack("img");
    let layout = Layout::open(world.path("img")).unwrap();
    let server = || FaultServer::start(layout.clone()).unwrap();
    let (lying, stalling, upstream) = (server(), server(), server());
    lying.fault(Fault::WrongBytes);
    stalling.fault(Fault::Stall(200_000));
    // Each of them sends what would fail a read alone; the registry has no ranges.
    upstream.fault(Fault::IgnoreRange);
    let hosts = world.path("certs.d").join(upstream.host());
    std::fs::create_dir_all(&hosts).unwrap();
    let listed = [&lying, &stalling]
        .map(|mirror| format!("[host.'http://{}']\ncapabilities = ['pull']\n", mirror.host()));
    std::fs::write(hosts.join("hosts.toml"), listed.concat()).unwrap();
    let config =
        format!("[registry]\nhosts_dir = {:?}\n[fetch]\nread_deadline_s = 30\n", world.path("certs.d"));
    std::fs::write(world.path("config.toml"), config).unwrap();

    let client = world.start_daemon().await;
    let image = format!("{}/a/b", upstream.host());
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let began = std::time::Instant::now();
    world.assert_same("mnt");
    assert!(began.elapsed() < Duration::from_secs(30));
    until_ready(&client).await;
    drop_caches();
    world.assert_same("mnt");
    // The liar was asked, and not again and again.
    let asked = lying.counts().blob_requests;
    assert!((1..=10).contains(&asked), "{asked}");
    let status = client.status().await.unwrap();
    assert!(status.blobs.iter().all(|blob| blob.fault.is_none()), "{status:?}");
    world.assert_all_gone(&client).await;
}

/// A dfdaemon that hangs, refuses, or sends what is wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_dragonfly_costs_no_byte() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    world.pack("img");
    let layout = Layout::open(world.path("img")).unwrap();
    let (dragonfly, upstream) =
        (FaultServer::start(layout.clone()).unwrap(), FaultServer::start(layout).unwrap());
    let config = format!("[dragonfly]\nendpoint = 'http://{}'\n", dragonfly.host());
    std::fs::write(world.path("config.toml"), config).unwrap();
    let limit = Fault::Status {
        code: 429,
        headers: vec![("X-Dragonfly-Error-Type".into(), "proxy".into())],
        body: vec![],
    };
    let internal = Fault::Status { code: 500, headers: vec![], body: b"dfdaemon".to_vec() };
    for fault in [Fault::WrongBytes, Fault::Stall(0), Fault::Stall(100_000), limit, internal, Fault::Drop] {
        dragonfly.fault(fault.clone());
        let client = world.start_daemon().await;
        let image = format!("{}/a/b", upstream.host());
        client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
        world.assert_same("mnt");
        assert!(dragonfly.counts().blob_requests > 0, "it was not asked");
        let page = client.metrics().await.unwrap();
        assert!(!page.contains("skimmer_received_bytes_total{source=\"registry\"} 0\n"), "{fault:?}: {page}");
        // The next one begins with nothing.
        client.umount(world.path("mnt"), false).await.unwrap();
        client.shutdown(false).await.unwrap();
        assert!(world.daemon.take().unwrap().wait().unwrap().success());
        std::fs::remove_dir_all(world.path("root")).unwrap();
    }
    let client = world.start_daemon().await;
    world.assert_all_gone(&client).await;
}

/// Small flights share requests: a gigabyte that is read from front to back costs at most a hundred of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_sequential_read_is_few_requests() {
    const SIZE: usize = 256 << 20;
    let Some(mut world) = World::start() else { return };
    let bytes = content(7, SIZE);
    std::fs::write(world.path("tree/file"), &bytes).unwrap();
    world.pack("img");
    let server = FaultServer::start(Layout::open(world.path("img")).unwrap()).unwrap();
    let client = world.start_daemon().await;
    let image = format!("{}/a/b", server.host());
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let before = server.counts().blob_requests;
    let path = world.path("mnt/file");
    let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await.unwrap().unwrap();
    assert!(read == bytes);
    let asked = server.counts().blob_requests - before;
    assert!(asked <= 100 * u64::try_from(SIZE).unwrap() / (1 << 30), "{asked} requests");
    eprintln!("{asked} requests for {} MiB", SIZE >> 20);
    until_ready(&client).await;
    world.assert_all_gone(&client).await;
}

/// A prefetch takes its blobs in turn; one that waits longer for its turn than a reader is waited for keeps its request.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_of_many_blobs_asks_once_for_each() {
    const IMAGES: u32 = 8;
    let Some(mut world) = World::start() else { return };
    // Two flights of a prefetch at a time.
    std::fs::write(world.path("config.toml"), "[fetch]\nbudget_mib = 16\n").unwrap();
    let client = world.start_daemon().await;
    let mut servers = Vec::new();
    for number in 0..IMAGES {
        std::fs::write(world.path("tree/file"), content(100 + number, 6 << 20)).unwrap();
        let (image, target) = (format!("img{number}"), format!("mnt{number}"));
        world.pack(&image);
        let server = FaultServer::start(Layout::open(world.path(&image)).unwrap()).unwrap();
        std::fs::create_dir_all(world.path(&target)).unwrap();
        client
            .mount(&MountRequest::new(format!("{}/a/b", server.host()), world.path(&target)))
            .await
            .unwrap();
        server.fault(Fault::Slow(2 << 20));
        servers.push((server.counts().blob_requests, server, target));
    }
    for (.., target) in &servers {
        let target = world.path(target);
        let request = PrefetchRequest { target, paths: Vec::new(), background: false, wait: false };
        client.prefetch(&request).await.unwrap();
    }
    until_ready(&client).await;
    for (before, server, target) in &servers {
        assert_eq!(server.counts().blob_requests - before, 1, "{target}");
        world.umount(&client, target).await;
    }
    world.assert_all_gone(&client).await;
}
