//! The whole daemon on the running kernel: a packed directory, mounted through fanotify by the real `skimmerd`.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

mod world;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use skimmer_client::{
    AttachMode, Client, ClientError, MountRequest, PrefetchRequest, Record, ScrubRequest, StartOptions,
};
use skimmer_config::Config;
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::testing::FaultServer;
use world::{World, content, drop_caches, until_ready, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn mount_read_unmount_and_nothing_is_left() {
    let Some(mut world) = World::start_alone() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    let mount = client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    assert_eq!(mount.mode, AttachMode::Fanotify, "{}", mount.reason);

    let read_ahead = world.read_ahead();
    assert_eq!(read_ahead(), Config::default().mount.cold_read_ahead_kib);

    let clone = client.mount(&MountRequest::new(&image, world.path("mnt2"))).await.unwrap();
    assert!(clone.reason.contains("shares"), "{}", clone.reason);
    let again = client.mount(&MountRequest::new(&image, world.path("mnt2"))).await;
    assert!(matches!(again, Err(ClientError::Api { status: 409, .. })), "{again:?}");
    assert_eq!(world.umount(&client, "mnt").await.target, mount.target);
    world.assert_same("mnt2");
    until_ready(&client).await;
    // All is there: the kernel may read far ahead. It is told a moment after the mark is gone.
    for _ in 0..500 {
        if read_ahead() != Config::default().mount.cold_read_ahead_kib {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(read_ahead(), Config::default().mount.read_ahead_kib);

    let open = std::fs::File::open(world.path("mnt2/file0")).unwrap();
    let busy = client.umount(world.path("mnt2"), false).await;
    assert!(matches!(busy, Err(ClientError::Api { status: 409, .. })), "{busy:?}");
    drop(open);
    world.umount(&client, "mnt2").await;
    assert!(client.status().await.unwrap().blobs.is_empty());

    let warm = client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    assert_eq!(warm.mode, AttachMode::Local, "{}", warm.reason);
    drop_caches();
    world.assert_same("mnt");
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_the_configuration_and_nothing_else() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    std::fs::write(world.path("config.toml"), "log = \"info\"\n").unwrap();
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let before = client.status().await.unwrap();
    let reload = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skimmerd"));
        command.arg("--socket").arg(world.socket()).arg("--reload").output().unwrap()
    };

    std::fs::write(world.path("config.toml"), "[fetch]\nbudget_mib = 0\n").unwrap();
    let refused = reload();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("fetch.budget_mib"), "{said}");
    assert_eq!(client.status().await.unwrap().started_at_ms, before.started_at_ms);

    std::fs::write(world.path("config.toml"), "[fetch]\nbudget_mib = 32\n").unwrap();
    let done = reload();
    assert!(done.status.success(), "{}\n{}", String::from_utf8_lossy(&done.stderr), world.log());
    let client = Client::connect(world.socket()).await.unwrap();
    let after = client.status().await.unwrap();
    assert_eq!((after.pid, after.buffer_bytes), (before.pid, 32 << 20));
    assert!(after.started_at_ms > before.started_at_ms && after.mounts.len() == 1, "{after:?}");
    world.assert_same("mnt");

    // By the signal, too.
    let pid = rustix::process::Pid::from_raw(i32::try_from(after.pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    for _ in 0..1500 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let Ok(client) = Client::connect(world.socket()).await else { continue };
        let Ok(status) = client.status().await else { continue };
        if status.started_at_ms > after.started_at_ms {
            world.umount(&client, "mnt").await;
            return world.assert_all_gone(&client).await;
        }
    }
    panic!("the signal does nothing:\n{}", world.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_must_be_signed_is_not_mounted_without() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let key = world.path("cosign.pub");
    std::fs::write(&key, include_str!("../../fetcher/tests/data/p256.pub")).unwrap();
    let (file, all) = (world.path("config.toml"), format!("\"*\" = [{key:?}]"));
    std::fs::write(&file, format!("[signatures]\nrequired = {{ {all} }}\n")).unwrap();
    let client = world.start_daemon().await;
    let request = MountRequest::new(&image, world.path("mnt"));
    let refused = client.mount(&request).await;
    let Err(ClientError::Api { error, status: 422 }) = refused else { panic!("{refused:?}") };
    assert!(error.error.contains("cosign.pub: it has no signature"), "{}", error.error);
    assert!(error.remedy.unwrap().contains("cosign sign"));
    // A key that is lost asks for no less.
    std::fs::remove_file(&key).unwrap();
    let refused = client.mount(&request).await;
    assert!(
        matches!(&refused, Err(ClientError::Api { error, .. }) if error.error.contains("cosign.pub")),
        "{refused:?}"
    );

    std::fs::write(&file, format!("[signatures]\nrequired = {{ {all}, \"oci:\" = [] }}\n")).unwrap();
    client.reload().await.unwrap();
    let mut tries = 0;
    let client = loop {
        if let Ok(client) = Client::connect(world.socket()).await
            && client.mount(&request).await.is_ok()
        {
            break client;
        }
        tries += 1;
        assert!(tries < 1500, "{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    world.assert_same("mnt");
    world.umount(&client, "mnt").await;
    world.assert_all_gone(&client).await;
}

/// Whenever it comes: before, while and after one program takes the place of the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_is_heard_in_the_middle_of_a_reload() {
    let Some(mut world) = World::start() else { return };
    for step in 0..24 {
        drop(world.start_daemon().await);
        let mut daemon = world.daemon.take().unwrap();
        let pid = rustix::process::Pid::from_child(&daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
        tokio::time::sleep(Duration::from_millis(step * 8)).await;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut left = 1500;
        let ended = loop {
            if let Some(ended) = daemon.try_wait().unwrap() {
                break ended;
            }
            left -= 1;
            if left == 0 {
                world.daemon = Some(daemon);
                panic!("the end, {} ms after the reload, is not heard:\n{}", step * 8, world.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let by_signal = ended.signal() == Some(libc::SIGTERM);
        assert!(ended.success() || by_signal, "{} ms after the reload: {ended}\n{}", step * 8, world.log());
    }
}

/// Images of several times the cache's budget are read in turn.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_keeps_its_budget() {
    const BUDGET: u64 = 64 << 20;
    let Some(mut world) = World::start() else { return };
    std::fs::write(world.path("config.toml"), "[cache]\nbudget_mib = 64\n").unwrap();
    // The last one is larger.
    let bytes = |number: u32| if number == 6 { 40 << 20 } else { 20 << 20 };
    let mut images = Vec::new();
    for number in 0..7 {
        std::fs::write(world.path("tree/file"), content(number, bytes(number))).unwrap();
        images.push(world.pack(&format!("img{number}")));
    }
    let client = world.start_daemon().await;
    let mut most = 0;
    for (turn, number) in [6, 0, 6, 1, 2, 3, 4, 5, 0, 5].into_iter().enumerate() {
        let image = &images[usize::try_from(number).unwrap()];
        if turn == 2 {
            let mut looks = 0;
            let left = loop {
                let left = largest_blob(&world.path("root/blobs"));
                looks += 1;
                if left < 36 << 20 || looks == 500 {
                    break left;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            assert!(left > 10 << 20 && left < 36 << 20, "{left} bytes are left of 6\n{}", world.log());
        }
        client.mount(&MountRequest::new(image, world.path("mnt"))).await.unwrap();
        let file = world.path("mnt/file");
        let read = tokio::task::spawn_blocking(move || std::fs::read(file).unwrap());
        while !read.is_finished() {
            most = most.max(disk_use(&world.path("root")));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(read.await.unwrap() == content(number, bytes(number)), "image {number}\n{}", world.log());
        world.umount(&client, "mnt").await;
        drop_caches();
    }
    // What a mount begins with is not a flight's, and is counted at the next look.
    let flight = skimmer_engine::Config::default().max_flight;
    assert!(most <= BUDGET + flight, "{most} bytes were used\n{}", world.log());
    let log = world.log();
    assert!(log.matches("evicted").count() >= 4 && log.contains("evicted ranges"), "{log}");
    assert!(!log.contains("mounted images need"), "{log}");
    let status = client.status().await.unwrap();
    assert_eq!(status.cache_budget_bytes, BUDGET);
    assert!(status.cache_bytes > 20 << 20, "{status:?}");
    world.assert_all_gone(&client).await;
}

/// What the largest of the files, by its length, takes of the disk.
fn largest_blob(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    files.max_by_key(std::fs::Metadata::len).unwrap().blocks() * 512
}

/// What the files below a directory take of the disk, at least. One file grows while another one shrinks, so that a sum
/// over one look at each may count bytes that were never there together. A file that grows had, between two looks at all
/// of them, no less than at the first, and one that shrinks no less than at the second.
fn disk_use(dir: &std::path::Path) -> u64 {
    let (mut first, mut second) = (HashMap::new(), HashMap::new());
    look(dir, &mut first);
    look(dir, &mut second);
    first.iter().filter_map(|(inode, bytes)| second.get(inode).map(|again| bytes.min(again))).sum()
}

/// The disk space of the files below a directory, by inode.
fn look(dir: &std::path::Path, found: &mut HashMap<u64, u64>) {
    use std::os::unix::fs::MetadataExt;
    for entry in std::fs::read_dir(dir).unwrap().filter_map(Result::ok) {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => look(&entry.path(), found),
            Ok(metadata) => {
                found.insert(metadata.ino(), metadata.blocks() * 512);
            }
            // Gone meanwhile.
            Err(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_at_once_share_what_they_can() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let first = world.pack("img");
    let mut options = skimmer_mkfs::Options::default();
    options.chunk_size = 65_536;
    let second = world.pack_with("img2", options);
    let client = world.start_daemon().await;
    let mut requests = tokio::task::JoinSet::new();
    let places = [
        (&first, "mnt"),
        (&second, "mnt2"),
        (&first, "mnt3"),
        (&second, "mnt4"),
        (&first, "mnt5"),
        (&second, "mnt5"),
    ];
    for (image, target) in places {
        let (client, request) = (client.clone(), MountRequest::new(image, world.path(target)));
        requests.spawn(async move { client.mount(&request).await });
    }
    let mut refused = 0;
    while let Some(result) = requests.join_next().await {
        match result.unwrap() {
            Ok(mount) => assert_eq!(mount.mode, AttachMode::Fanotify),
            Err(ClientError::Api { error, status: 409 }) => {
                assert!(error.error.contains("mnt5"), "{error}");
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(refused, 1, "two images want one target");
    let mounts = client.mounts().await.unwrap();
    assert_eq!(mounts.len(), 5);
    let own = mounts.iter().filter(|mount| !mount.reason.contains("shares")).count();
    assert_eq!(own, 2, "one superblock per image: {mounts:#?}");
    for target in ["mnt5", "mnt", "mnt4", "mnt2", "mnt3"] {
        world.assert_same(target);
    }
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_costs_a_wait_and_no_byte() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let file = world.path("mnt/deep/er/file3");
    assert_eq!(std::fs::read(&file).unwrap(), content(3, 70_000));
    world.kill_daemon();

    let reader = {
        let file = world.path("mnt/file6");
        std::thread::spawn(move || std::fs::read(file))
    };
    let client = world.start_daemon().await;
    assert_eq!(client.mounts().await.unwrap().len(), 1, "{}", world.log());
    assert!(reader.join().unwrap().unwrap() == content(6, 12_000_000));
    drop_caches();
    world.assert_same("mnt");
    until_ready(&client).await;

    // Complete and recorded: the kernel serves alone, and the next daemon knows it.
    world.kill_daemon();
    drop_caches();
    world.assert_same("mnt");
    let client = world.start_daemon().await;
    until_ready(&client).await;
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lie_of_a_source_is_never_shown() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let blobs = world.path("img/blobs/sha256");
    let blob = std::fs::read_dir(&blobs).unwrap().map(|entry| entry.unwrap().path());
    let blob = blob.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&blob).unwrap();
    let length = bytes.len();
    for byte in &mut bytes[..length * 9 / 10] {
        *byte ^= 0x55;
    }
    std::fs::write(&blob, bytes).unwrap();

    std::fs::write(world.path("config.toml"), "[fetch]\nread_deadline_s = 2\n").unwrap();
    let options = StartOptions {
        socket: world.socket(),
        program: Some(env!("CARGO_BIN_EXE_skimmerd").into()),
        args: vec![
            "--root".into(),
            world.path("root").display().to_string(),
            "--config".into(),
            world.path("config.toml").display().to_string(),
        ],
        log: Some(world.path("log")),
        wait: Duration::from_secs(30),
    };
    wait_for(&world.keeper_socket()).await;
    let (client, started) = Client::connect_or_start(&options).await.unwrap();
    assert!(started);
    // The mount asks for no data: that the kernel asks is what it proves.
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let read = |path: PathBuf| tokio::task::spawn_blocking(move || std::fs::read(path));
    let mut failed = 0;
    for entry in std::fs::read_dir(world.path("tree")).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_type().unwrap().is_file() {
            continue;
        }
        match read(world.path("mnt").join(entry.file_name())).await.unwrap() {
            // The last tenth of the blob was left alone.
            Ok(bytes) => assert_eq!(bytes, std::fs::read(entry.path()).unwrap()),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "the blob was damaged");
    let status = client.status().await.unwrap();
    assert!(status.blobs.iter().any(|blob| blob.fault.is_some()), "{status:?}");
    world.umount(&client, "mnt").await;
    // What the mount needed is released, at the latest with the next sweep.
    for _ in 0..1500 {
        if client.status().await.unwrap().blobs.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let report = client.shutdown(true).await.unwrap();
    assert!(report.keeper_stopped, "{report:?}\n{}", world.log());
    assert!(world.keeper.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_still_open_is_told_when_everything_shall_end() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let open = std::fs::File::open(world.path("mnt/file0")).unwrap();
    client.umount(world.path("mnt"), true).await.unwrap();
    let stop_all = |world: &World| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skimmerd"));
        command.arg("--stop-all").arg("--socket").arg(world.socket()).output().unwrap()
    };
    let refused = stop_all(&world);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("open file"), "{said}");
    assert!(world.daemon.take().unwrap().wait().unwrap().success());
    drop(open);
    world.start_daemon().await;
    let done = stop_all(&world);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(world.daemon.take().unwrap().wait().unwrap().success(), "{}", world.log());
    assert!(world.keeper.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_traced_image_brings_its_start_before_it_is_read() {
    let Some(mut world) = World::start_alone() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    let mut request = MountRequest::new(&image, world.path("mnt"));
    request.record = Some(Record::Exact);
    client.mount(&request).await.unwrap();
    assert_eq!(
        world.read_ahead()(),
        Config::default().mount.start_read_ahead_kib,
        "recorded as it will start"
    );
    let files: Vec<PathBuf> = std::fs::read_dir(world.path("tree"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file() && entry.metadata().unwrap().len() > 0)
        .map(|entry| PathBuf::from(entry.file_name()))
        .take(3)
        .collect();
    let read = |mount: &str| {
        let (from, tree, files) = (world.path(mount), world.path("tree"), files.clone());
        tokio::task::spawn_blocking(move || {
            for file in files {
                assert_eq!(
                    std::fs::read(from.join(&file)).unwrap(),
                    std::fs::read(tree.join(&file)).unwrap()
                );
            }
        })
    };
    read("mnt").await.unwrap();
    let trace = client.recording(world.path("mnt")).await.unwrap();
    assert!(!trace.reads.is_empty() && !trace.fetches.is_empty() && !trace.cut, "{trace:?}");
    assert!(trace.fetches.iter().all(|fetch| fetch.demand), "exactly what was read: {trace:?}");
    world.umount(&client, "mnt").await;
    // What is cached would be read unseen.
    let refused = client.mount(&request).await;
    let Err(ClientError::Api { status: 409, .. }) = refused else { panic!("{refused:?}") };

    let layout = Layout::open(world.path("img")).unwrap();
    let reference = skimmer_fetcher::Reference::parse_source(&image).unwrap();
    let remote = skimmer_fetcher::image::open(&reference, &Default::default()).await.unwrap();
    let touches: Vec<skimmer_mkfs::Touch> = trace
        .reads
        .iter()
        .map(|read| {
            let id: skimmer_daemon::blob::BlobId = trace.blobs[read.blob].parse().unwrap();
            skimmer_mkfs::Touch { blob: *id.bytes(), offset: read.offset, length: read.length }
        })
        .collect();
    let from = skimmer_mkfs::Converted {
        name: "img",
        layout: &layout,
        blobs: &remote.blobs,
        bootstrap: &remote.bootstrap,
        config: &remote.config,
        annotations: None,
    };
    let output = Layout::create(world.path("traced")).unwrap();
    let optimized =
        skimmer_mkfs::optimize(&from, &touches, skimmer_mkfs::Pieces::Blocks, &output, &Default::default())
            .unwrap();

    // Over a registry the start blob is asked for while the bootstrap comes, and that request is the only one.
    let server = FaultServer::start(output).unwrap();
    let traced = format!("{}/a/b", server.host());
    let mut request = MountRequest::new(&traced, world.path("mnt2"));
    request.record = Some(Record::Events);
    client.mount(&request).await.unwrap();
    for _ in 0..1500 {
        let status = client.status().await.unwrap();
        let start = status.blobs.iter().find(|blob| blob.id == optimized.start_blob).unwrap();
        if start.ready_bytes == start.referenced_bytes {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = client.recording(world.path("mnt2")).await.unwrap();
    assert!(
        before.fetches.iter().any(|fetch| before.blobs[fetch.blob] == optimized.start_blob),
        "{before:?}"
    );
    let read_ahead = world.read_ahead();
    assert_eq!(read_ahead(), Config::default().mount.start_read_ahead_kib);
    assert_eq!(server.counts().blob_requests, 2, "bootstrap and start blob: {before:?}");
    read("mnt2").await.unwrap();
    let after = client.recording(world.path("mnt2")).await.unwrap();
    assert_eq!(after.fetches.len(), before.fetches.len(), "all that was read had come");
    // The start is over when its time is, and for the next daemon.
    world.kill_daemon();
    let client = world.start_daemon().await;
    assert_eq!(read_ahead(), Config::default().mount.cold_read_ahead_kib);

    let mut ahead = PrefetchRequest {
        target: world.path("mnt2"),
        paths: vec!["/no/such/file".into()],
        background: false,
        wait: true,
    };
    let refused = client.prefetch(&ahead).await;
    let Err(ClientError::Api { error, status: 404 }) = refused else { panic!("{refused:?}") };
    assert!(error.error.contains("/no/such/file"), "{error}");
    ahead.paths = vec!["/deep".into()];
    let some = client.prefetch(&ahead).await.unwrap();
    ahead.paths = Vec::new();
    ahead.background = true;
    let all = client.prefetch(&ahead).await.unwrap();
    assert!(all.bytes > some.bytes && all.missing_bytes == 0, "{some:?} {all:?}");
    until_ready(&client).await;
    world.assert_same("mnt2");
    ahead.target = world.path("mnt");
    assert!(matches!(client.prefetch(&ahead).await, Err(ClientError::Api { status: 404, .. })));
    assert!(matches!(client.recording(world.path("mnt")).await, Err(ClientError::Api { status: 404, .. })));
    world.umount(&client, "mnt2").await;
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_mount_over_an_image_is_neither_shared_nor_taken_away() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    let cover = Command::new("mount").args(["-t", "tmpfs", "cover"]).arg(world.path("mnt")).status().unwrap();
    assert!(cover.success());
    std::fs::write(world.path("mnt/foreign"), b"x").unwrap();

    let second = client.mount(&MountRequest::new(&image, world.path("mnt2"))).await.unwrap();
    assert!(!second.reason.contains("shares"), "{}", second.reason);
    world.assert_same("mnt2");
    for detach in [false, true] {
        let refused = client.umount(world.path("mnt"), detach).await;
        let Err(ClientError::Api { error, status: 409 }) = refused else { panic!("{refused:?}") };
        assert!(error.error.contains("something else"), "{error}");
        assert!(world.path("mnt/foreign").exists(), "it is not ours");
    }

    // With one of two visible, that one is shared.
    let third = client.mount(&MountRequest::new(&image, world.path("mnt3"))).await.unwrap();
    world.assert_same("mnt3");
    assert_eq!(client.mounts().await.unwrap().len(), 3, "{third:?}");
    skimmer_daemon::mounts::kernel::umount(&world.path("mnt"), false).unwrap();
    world.assert_same("mnt");
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_a_restart_cannot_serve_is_kept_for_the_next_one() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    client.mount(&MountRequest::new(&image, world.path("mnt2"))).await.unwrap();
    world.kill_daemon();
    // A directory in the record's place opens and cannot be read.
    let record = std::fs::read_dir(world.path("root/images")).unwrap().next().unwrap().unwrap().path();
    let aside = world.path("aside");
    std::fs::rename(&record, &aside).unwrap();
    std::fs::create_dir(&record).unwrap();

    let client = world.start_daemon().await;
    for mounts in [client.mounts().await.unwrap(), client.status().await.unwrap().mounts] {
        assert_eq!(mounts.len(), 2, "{}", world.log());
        assert!(mounts.iter().all(|mount| mount.fault.is_some()), "{mounts:#?}");
    }
    world.umount(&client, "mnt2").await;
    world.kill_daemon();
    std::fs::remove_dir(&record).unwrap();
    std::fs::rename(&aside, &record).unwrap();

    let client = world.start_daemon().await;
    let mounts = client.mounts().await.unwrap();
    assert!(mounts.len() == 1 && mounts[0].fault.is_none(), "{mounts:#?}\n{}", world.log());
    world.assert_same("mnt");
    world.assert_all_gone(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_keeper_ends_the_daemon_with_its_words_and_leaves_the_mounts() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    world.keeper.kill().unwrap();
    world.keeper.wait().unwrap();
    let mut daemon = world.daemon.take().unwrap();
    let ended = tokio::task::spawn_blocking(move || daemon.wait().unwrap()).await.unwrap();
    assert!(!ended.success(), "{}", world.log());
    assert!(world.log().contains("skimmerd: ") && world.log().contains("keeper"), "{}", world.log());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.contains(&*world.path("mnt").to_string_lossy()), "{mounts}");
    let record = std::fs::read_to_string(world.path("root/mounts.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["clean"], false);
    assert_eq!(record["attachments"][0]["mounts"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_finds_what_went_bad_and_repairs_it() {
    let Some(mut world) = World::start() else { return };
    world.fill_tree();
    let image = world.pack("img");
    let client = world.start_daemon().await;
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    world.assert_same("mnt");
    until_ready(&client).await;
    let clean = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert!(clean.chunks > 0 && clean.blobs_done == 1 && !clean.running, "{clean:?}");
    assert_eq!((clean.bad, clean.failed), (0, 0), "{clean:?}");

    // Bytes that change behind the file system's back, in the first block.
    let blobs = std::fs::read_dir(world.path("root/blobs")).unwrap().map(|entry| entry.unwrap().path());
    let blob = blobs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let spoil = || {
        let file = std::fs::File::options().write(true).open(&blob).unwrap();
        file.write_all_at(b"not what was verified", 0).unwrap();
        file.sync_all().unwrap();
    };
    spoil();
    let check = ScrubRequest { check_only: true, ..ScrubRequest::default() };
    let found = client.scrub(&check).await.unwrap();
    assert_eq!((found.bad, found.repaired), (1, 0), "{found:?}");
    // Mounted: it is fetched and written anew.
    let repaired = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert_eq!((repaired.bad, repaired.repaired, repaired.failed), (1, 1, 0), "{repaired:?}");
    assert_eq!(client.scrub(&check).await.unwrap().bad, 0);
    world.umount(&client, "mnt").await;
    drop_caches();
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    world.assert_same("mnt");

    // A bootstrap, mounted and not.
    let mut bootstraps = std::fs::read_dir(world.path("root/bootstraps")).unwrap();
    let bootstrap = bootstraps.next().unwrap().unwrap().path();
    let right = std::fs::read(&bootstrap).unwrap();
    let spoil_bootstrap = || {
        let file = std::fs::File::options().write(true).open(&bootstrap).unwrap();
        // Where no structure is that the kernel has in use.
        file.write_all_at(b"not what was verified", 0).unwrap();
        file.sync_all().unwrap();
    };
    spoil_bootstrap();
    let found = client.scrub(&check).await.unwrap();
    assert_eq!((found.bootstraps, found.bad, found.repaired), (1, 1, 0), "{found:?}");
    let repaired = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert_eq!((repaired.bad, repaired.repaired, repaired.failed), (1, 1, 0), "{repaired:?}");
    assert!(std::fs::read(&bootstrap).unwrap() == right);
    world.assert_same("mnt");
    world.umount(&client, "mnt").await;
    spoil_bootstrap();
    let dropped = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert_eq!((dropped.bad, dropped.repaired), (1, 1), "{dropped:?}");
    assert!(!bootstrap.exists());
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    world.assert_same("mnt");

    // Not mounted: the blob is dropped, and fetched when it is needed.
    world.umount(&client, "mnt").await;
    spoil();
    let dropped = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert_eq!((dropped.bad, dropped.repaired), (1, 1), "{dropped:?}");
    assert!(!blob.exists());
    client.mount(&MountRequest::new(&image, world.path("mnt"))).await.unwrap();
    world.assert_same("mnt");
    until_ready(&client).await;

    // Mounted, and the image is gone from where it came.
    spoil();
    spoil_bootstrap();
    std::fs::rename(world.path("img"), world.path("gone")).unwrap();
    let failed = client.scrub(&ScrubRequest::default()).await.unwrap();
    assert_eq!((failed.bad, failed.repaired, failed.failed), (2, 0, 2), "{failed:?}");
    assert!(
        failed.failures[0].contains("bootstrap") && failed.failures[1].contains("bytes 0.."),
        "{failed:?}"
    );
    assert_eq!(client.scrubbed().await.unwrap(), failed);
    world.assert_all_gone(&client).await;
}
