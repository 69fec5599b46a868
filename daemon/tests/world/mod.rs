//! What the tests with a real daemon share: a directory with everything, a keeper, and the real `skimmerd`.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use skimmer_client::{Client, ClientError, Mount};
use skimmer_fetcher::layout::Layout;
use skimmer_test_support::{scratch_dir, skip_this};
use tempfile::TempDir;

/// Set for the process that plays the keeper.
const KEEPER_SOCKET: &str = "SKIMMER_TEST_KEEPER_SOCKET";

/// Not a test: what [`World::start`] runs this very program for, so that the keeper is a process of its own.
#[test]
#[ignore = "runs only as the keeper of the other tests"]
fn keeper_process() {
    let Some(socket) = std::env::var_os(KEEPER_SOCKET) else { return };
    let mut config = skimmer_keeper::server::Config::new(PathBuf::from(socket));
    config.oom_score_adj = 0;
    skimmer_keeper::server::Server::new(config).unwrap().run();
}

/// A directory with everything, a keeper, and a daemon that can be killed.
pub(crate) struct World {
    dir: TempDir,
    /// Apart, and short: a socket's path has at most 107 bytes.
    sockets: TempDir,
    pub(crate) keeper: Child,
    pub(crate) daemon: Option<Child>,
    _turn: Turn,
}

/// Whether other tests of this program may mount images at the same time.
static TURNS: RwLock<()> = RwLock::new(());

/// Held for its drop.
enum Turn {
    Together(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

impl World {
    /// `None` where this kernel or user cannot run it: the test is then counted as skipped.
    #[track_caller]
    pub(crate) fn start() -> Option<Self> {
        Self::in_turn(Turn::Together(TURNS.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// As [`Self::start`], while no other test mounts anything: a daemon tells its superblock from others by its being
    /// the only new one.
    #[track_caller]
    pub(crate) fn start_alone() -> Option<Self> {
        Self::in_turn(Turn::Alone(TURNS.write().unwrap_or_else(PoisonError::into_inner)))
    }

    #[track_caller]
    fn in_turn(turn: Turn) -> Option<Self> {
        let dir = scratch_dir();
        if let Err(why) = skimmer_fanotify::probe(dir.path()) {
            skip_this(&why.to_string());
            return None;
        }
        if let Err(why) = skimmer_daemon::mounts::kernel::probe_erofs() {
            skip_this(&why.to_string());
            return None;
        }
        let sockets = tempfile::tempdir().unwrap();
        let keeper = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "world::keeper_process"])
            .env(KEEPER_SOCKET, sockets.path().join("keeper.sock"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let world = Self { dir, sockets, keeper, daemon: None, _turn: turn };
        for name in ["mnt", "mnt2", "mnt3", "mnt4", "mnt5", "tree/deep/er"] {
            std::fs::create_dir_all(world.path(name)).unwrap();
        }
        Some(world)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn keeper_socket(&self) -> PathBuf {
        self.sockets.path().join("keeper.sock")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.sockets.path().join("skimmerd.sock")
    }

    /// Starts `skimmerd` and waits until it answers.
    pub(crate) async fn start_daemon(&mut self) -> Client {
        wait_for(&self.keeper_socket()).await;
        let mut command = Command::new(env!("CARGO_BIN_EXE_skimmerd"));
        if self.path("config.toml").exists() {
            command.arg("--config").arg(self.path("config.toml"));
        }
        let child = command
            .arg("--root")
            .arg(self.path("root"))
            .arg("--socket")
            .arg(self.socket())
            .stderr(std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap())
            .spawn()
            .unwrap();
        self.daemon = Some(child);
        for _ in 0..1500 {
            if let Ok(client) = Client::connect(self.socket()).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("skimmerd does not answer:\n{}", self.log());
    }

    pub(crate) fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// What reads the readahead of the only superblock, KiB.
    pub(crate) fn read_ahead(&self) -> impl Fn() -> u64 + use<> {
        let text = std::fs::read_to_string(self.path("root/mounts.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        let name = record["attachments"][0]["bdi"].as_str().unwrap().to_owned();
        let path = format!("/sys/class/bdi/{name}/read_ahead_kb");
        move || std::fs::read_to_string(&path).unwrap().trim().parse().unwrap()
    }

    /// Takes a mount away. A child that another test starts just now has our open files until it executes its program.
    pub(crate) async fn umount(&self, client: &Client, target: &str) -> Mount {
        let mut tries = 0;
        loop {
            match client.umount(self.path(target), false).await {
                Ok(mount) => return mount,
                Err(ClientError::Api { status: 409, .. }) if tries < 200 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Files of many sizes; the content of each depends on its number.
    pub(crate) fn fill_tree(&self) {
        for (number, size) in (0_u32..).zip([1_usize, 4096, 5000, 70_000, 1 << 20, 3_500_000, 12_000_000, 0])
        {
            let dir = if number % 2 == 0 { "tree" } else { "tree/deep/er" };
            let file = self.path(dir).join(format!("file{number}"));
            std::fs::write(file, content(number, size)).unwrap();
        }
        std::os::unix::fs::symlink("deep/er/file1", self.path("tree/link")).unwrap();
    }

    /// Packs the tree and returns the image's name.
    pub(crate) fn pack(&self, name: &str) -> String {
        self.pack_with(name, skimmer_mkfs::Options::default())
    }

    pub(crate) fn pack_with(&self, name: &str, options: skimmer_mkfs::Options) -> String {
        let layout = Layout::create(self.path(name)).unwrap();
        let input = skimmer_mkfs::Input::Directory(self.path("tree"));
        skimmer_mkfs::convert(input, &layout, &options, &()).unwrap();
        format!("oci:{}", self.path(name).display())
    }

    pub(crate) fn assert_same(&self, mount: &str) {
        let output = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .arg(self.path("tree"))
            .arg(self.path(mount))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), self.log());
    }

    /// Nothing of this world is mounted, and neither process is left.
    pub(crate) async fn assert_all_gone(mut self, client: &Client) {
        let report = client.shutdown(true).await.unwrap();
        assert!(report.remaining.is_empty() && report.keeper_stopped, "{report:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*self.dir.path().to_string_lossy()), "{mounts}");
        assert!(self.daemon.take().unwrap().wait().unwrap().success(), "{}", self.log());
        assert!(self.keeper.wait().unwrap().success());
    }
}

impl Drop for World {
    /// After a failed test: unmounts, then ends what is left.
    fn drop(&mut self) {
        for target in ["mnt", "mnt2", "mnt3", "mnt4", "mnt5"] {
            while skimmer_daemon::mounts::kernel::umount(&self.path(target), true).is_ok() {}
        }
        // A daemon that was started detached is no child of ours to hold; its pid is in the lock.
        let pid =
            std::fs::read_to_string(self.path("root/lock")).ok().and_then(|pid| pid.trim().parse().ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid.filter(|_| std::thread::panicking()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        for child in [self.daemon.as_mut(), Some(&mut self.keeper)].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn content(number: u32, size: usize) -> Vec<u8> {
    let mut state = u64::from(number) * 2 + 1;
    let next = |state: &mut u64| {
        *state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        state.to_le_bytes()[7]
    };
    (0..size).map(|_| next(&mut state)).collect()
}

pub(crate) async fn wait_for(path: &Path) {
    for _ in 0..1500 {
        if path.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{} does not appear", path.display());
}

pub(crate) async fn until_ready(client: &Client) {
    for _ in 0..1500 {
        let status = client.status().await.unwrap();
        if status.blobs.iter().all(|blob| blob.ready_bytes == blob.referenced_bytes && !blob.watched) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never complete: {:#?}", client.status().await.unwrap().blobs);
}

pub(crate) fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}
