//! Images made of Debian packages, as OCI layouts in the user's cache: three layers each, with a program that uses a
//! small part of them, as containers do.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use skimmer_vm_images::cache::{Entry, Key};
use skimmer_vm_images::{debian, run};

/// Changes whenever this file makes other bytes from the same packages.
const RECIPE: &str = "3";
/// The image's tag in its layout.
pub const TAG: &str = "latest";
const BASE: &[&str] = &[
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "ncurses-base",
    "ncurses-bin",
    "passwd",
    "perl-base",
    "sed",
    "tar",
    "util-linux",
];

/// An image and its program.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// The image's name.
    pub name: &'static str,
    /// Packages of its second layer; what they need comes with them.
    packages: &'static [&'static str],
    /// Files of its third layer.
    files: &'static [(&'static str, &'static str)],
    /// Links that scripts of its packages would make: (link below `/usr`, target).
    links: &'static [(&'static str, &'static str)],
    /// The command line that runs it in the image's root.
    pub run: &'static [&'static str],
    /// What it prints, or answers, contains this.
    pub expect: &'static str,
    /// A server: its port on the loopback, and the first request.
    pub ask: Option<(u16, &'static str)>,
}

/// A Python application that uses a few modules of many.
pub const PYTHON: Program = Program {
    name: "python",
    packages: &[
        "ca-certificates",
        "git",
        "media-types",
        "python3",
        "python3-jinja2",
        "python3-numpy",
        "python3-pandas",
        "python3-requests",
        "python3-scipy",
        "python3-sqlalchemy",
        "python3-yaml",
    ],
    files: &[(
        "app/main.py",
        r#"import json, sqlite3, sys
import jinja2, numpy, requests
page = jinja2.Template("{{ n }} squares sum to {{ s }}").render(n=10, s=int((numpy.arange(10) ** 2).sum()))
print(json.dumps({"python": sys.version.split()[0], "requests": requests.__version__, "page": page}), flush=True)
"#,
    )],
    links: &[
        ("lib/x86_64-linux-gnu/libblas.so.3", "blas/libblas.so.3"),
        ("lib/x86_64-linux-gnu/liblapack.so.3", "lapack/liblapack.so.3"),
    ],
    run: &["/usr/bin/python3", "-B", "/app/main.py"],
    expect: "10 squares sum to 285",
    ask: None,
};

/// A Node.js application beside npm.
pub const NODE: Program = Program {
    name: "node",
    packages: &["ca-certificates", "node-typescript", "node-undici", "nodejs"],
    files: &[(
        "app/main.js",
        "const path = require('path'), zlib = require('zlib');\n\
         const text = zlib.gunzipSync(zlib.gzipSync('squares')).toString();\n\
         console.log(`10 ${text} sum to ${[...Array(10).keys()].reduce((s, n) => s + n * n, 0)}`);\n",
    )],
    links: &[],
    run: &["/usr/bin/node", "/app/main.js"],
    expect: "10 squares sum to 285",
    ask: None,
};

/// A Perl program.
pub const PERL: Program = Program {
    name: "perl",
    packages: &["ca-certificates", "libdatetime-perl", "libmoose-perl", "libwww-perl", "perl"],
    files: &[(
        "app/main.pl",
        "use strict; use warnings; use POSIX; use List::Util qw(sum); use JSON::PP;\n\
         print encode_json({page => '10 squares sum to ' . sum(map { $_ * $_ } 0 .. 9)}), \"\\n\";\n",
    )],
    links: &[],
    run: &["/usr/bin/perl", "/app/main.pl"],
    expect: "10 squares sum to 285",
    ask: None,
};

/// A C compiler asked for its version.
pub const GCC: Program = Program {
    name: "gcc",
    packages: &["g++", "gcc", "libc6-dev", "make"],
    files: &[("app/main.c", "int main(void) { return 0; }\n")],
    links: &[],
    run: &["/usr/bin/gcc", "--version"],
    expect: "Free Software Foundation",
    ask: None,
};

/// A web server that writes no files.
pub const NGINX: Program = Program {
    name: "nginx",
    packages: &["ca-certificates", "libnginx-mod-http-perl", "media-types", "nginx-core"],
    files: &[
        (
            "app/nginx.conf",
            "daemon off; master_process off; pid /dev/null; error_log stderr; user root;\n\
             events { worker_connections 64; }\n\
             http { access_log off; include /etc/nginx/mime.types;\n\
             client_body_temp_path /tmp; proxy_temp_path /tmp; fastcgi_temp_path /tmp; uwsgi_temp_path /tmp;\n\
             scgi_temp_path /tmp;\n\
             server { listen 127.0.0.1:18081; root /app/www; } }\n",
        ),
        ("app/www/index.html", "<p>10 squares sum to 285</p>\n"),
    ],
    links: &[],
    run: &["/usr/sbin/nginx", "-e", "stderr", "-c", "/app/nginx.conf"],
    expect: "10 squares sum to 285",
    ask: Some((18081, "GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")),
};

/// A key-value store that writes no files.
pub const REDIS: Program = Program {
    name: "redis",
    packages: &["ca-certificates", "redis-server", "redis-tools"],
    files: &[("app/redis.conf", "bind 127.0.0.1\nport 18082\nsave \"\"\nappendonly no\ndaemonize no\n")],
    links: &[],
    run: &["/usr/bin/redis-server", "/app/redis.conf"],
    expect: "+PONG",
    ask: Some((18082, "PING\r\n")),
};

/// Every image.
pub const ALL: &[&Program] = &[&PYTHON, &NODE, &PERL, &GCC, &NGINX, &REDIS];

/// The image `name`.
///
/// # Errors
/// There is none: the message lists those that exist.
pub fn find(name: &str) -> Result<&'static Program> {
    let names: Vec<&str> = ALL.iter().map(|program| program.name).collect();
    let found = ALL.iter().find(|program| program.name == name);
    found.copied().with_context(|| format!("no image {name}; there are: {}", names.join(", ")))
}

/// Makes an image if the cache does not hold it; returns its OCI layout.
///
/// # Errors
/// A package cannot be fetched, a file cannot be written, or we are not root.
pub fn prepare(program: &Program) -> Result<PathBuf> {
    let base = debian::resolve(BASE, &[])?;
    let packages = debian::resolve(program.packages, &base)?;
    let mut key = Key::new("image");
    for text in [RECIPE, program.name].into_iter().chain(base.iter().chain(&packages).map(String::as_str)) {
        key.add(text.as_bytes());
    }
    for (path, content) in program.files {
        key.add(path.as_bytes());
        key.add(content.as_bytes());
    }
    let entry = Entry::new("images", &key.finish())?;
    let directory = entry.get_or_make(|aside| make(program, &base, &packages, aside))?;
    Ok(directory.join("layout"))
}

fn make(program: &Program, base: &[String], packages: &[String], aside: &Path) -> Result<()> {
    eprintln!("making the image {} of {} Debian packages (once)", program.name, base.len() + packages.len());
    let work = tempfile::tempdir_in(aside)?;
    let layout = aside.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let mut layers = Vec::new();
    for (name, packages) in [("base", base), ("packages", packages)] {
        let root = work.path().join(name);
        debian::unpack(packages, &root)?;
        if name == "packages" {
            for (link, target) in program.links {
                symlink(target, root.join("usr").join(link))?;
            }
        }
        layers.push(pack(&root, &layout)?);
    }
    let application = work.path().join("application");
    application_layer(&application, program)?;
    layers.push(pack(&application, &layout)?);
    write_layout(&layout, &layers, program)
}

/// The program, a whiteout of a directory and of a file, an opaque directory, a hard link and a capability.
fn application_layer(root: &Path, program: &Program) -> Result<()> {
    for dir in ["app/data", "dev", "proc", "run", "tmp", "usr/share", "usr/share/man", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    for (path, content) in program.files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().context("a file has a parent")?)?;
        fs::write(path, content)?;
    }
    if let Some((path, _)) = program.files.first() {
        fs::hard_link(root.join(path), root.join("app/entry"))?;
    }
    fs::write(root.join("app/helper"), format!("#!/bin/sh\nexec {}\n", program.run.join(" ")))?;
    fs::set_permissions(root.join("app/helper"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("app/data/zeros"), vec![0_u8; 3 << 20])?;
    // cap_net_bind_service, permitted and effective (revision 2 of the on-disk form).
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let helper = root.join("app/helper");
    rustix::fs::setxattr(&helper, "security.capability", &capability, rustix::fs::XattrFlags::empty())
        .context("cannot set a capability (needs root)")?;
    fs::write(root.join("usr/share/.wh.doc"), "")?;
    fs::write(root.join("usr/share/man/.wh..wh..opq"), "")?;
    fs::write(root.join("etc/.wh.issue"), "")?;
    // A script of base-passwd would make them.
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write(root.join("etc/hostname"), format!("{}\n", program.name))?;
    Ok(())
}

struct Layer {
    descriptor: Value,
    diff_id: String,
}

/// Packs `root` as one gzip layer into `layout`, the same bytes each time.
fn pack(root: &Path, layout: &Path) -> Result<Layer> {
    let tar = layout.join("layer.tar");
    let mut pack = Command::new("tar");
    pack.args(["--sort=name", "--mtime=@1700000000", "--numeric-owner"]);
    pack.args(["--owner=0", "--group=0", "--xattrs", "--xattrs-include=*", "--format=posix"]);
    pack.args(["--pax-option=delete=atime,delete=ctime", "-cf"]).arg(&tar).arg("-C").arg(root).arg(".");
    run(&mut pack)?;
    let diff_id = hash_file(&tar)?;
    let gzip = layout.join("layer.tar.gz");
    let mut compress = Command::new("gzip");
    let status = compress
        .args(["-n", "-6", "-c"])
        .stdin(Stdio::null())
        .arg(&tar)
        .stdout(fs::File::create(&gzip)?)
        .status()?;
    anyhow::ensure!(status.success(), "gzip failed: {status}");
    fs::remove_file(&tar)?;
    let digest = hash_file(&gzip)?;
    let size = fs::metadata(&gzip)?.len();
    fs::rename(&gzip, layout.join("blobs/sha256").join(&digest))?;
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    let descriptor = json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size});
    Ok(Layer { descriptor, diff_id: format!("sha256:{diff_id}") })
}

fn hash_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = fs::File::open(path)?;
    std::io::copy(&mut file, &mut HashWriter(&mut hash))?;
    Ok(hex::encode(hash.finalize()))
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn write_layout(layout: &Path, layers: &[Layer], program: &Program) -> Result<()> {
    let diff_ids: Vec<&String> = layers.iter().map(|layer| &layer.diff_id).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": program.run, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": layers.iter().map(|_| json!({"created_by": "skimmer-kernel-tests"})).collect::<Vec<_>>(),
    });
    let config = put(layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let descriptors: Vec<&Value> = layers.iter().map(|layer| &layer.descriptor).collect();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": descriptors,
    });
    let mut manifest = put(layout, &manifest, media_type)?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": TAG});
    fs::write(layout.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(())
}

fn put(layout: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let bytes = value.to_string();
    let digest = hex::encode(Sha256::digest(bytes.as_bytes()));
    fs::write(layout.join("blobs/sha256").join(&digest), &bytes)?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}
