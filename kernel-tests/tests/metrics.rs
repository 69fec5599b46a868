//! The metrics as others see them: promtool reads the page, and a real Prometheus answers what the dashboard asks.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kernel_tests::debian_image::{self, PERL, TAG};
use kernel_tests::machine::Machine;
use kernel_tests::skimmer::{Node, programs};
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use kernel_tests::wait::wait;
use serde_json::Value;
use skimmer_vm_images::{debian, run};

/// The Debian package with Prometheus and promtool; unpacked, not installed: it would start a service.
const PACKAGE: &str = "prometheus";
const DASHBOARD: &str = include_str!("../../packaging/grafana/skimmer.json");
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn prometheus_takes_the_metrics_and_answers_the_dashboard() {
    let test = "prometheus_takes_the_metrics_and_answers_the_dashboard";
    if let Some(why) = not_root().or_else(no_precontent_events) {
        return skip(test, &why);
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if let Err(error) = play(scratch.path()) {
        panic!("{error:#}");
    }
}

fn play(scratch: &Path) -> Result<()> {
    let tools = debian::alone(PACKAGE)?.join("usr/bin");
    let layout = debian_image::prepare(&PERL)?;
    let converted = scratch.join("converted");
    let source = format!("oci:{}:{TAG}", layout.display());
    run(Command::new(&programs()?[0]).args(["convert", &source]).arg(&converted))?;

    let (ours, theirs) = (free()?, free()?);
    let sockets = tempfile::tempdir()?;
    let machine = Machine::host();
    let text = |path: &Path| path.to_str().context("not UTF-8").map(str::to_owned);
    let bin = text(programs()?[0].parent().context("a program lies somewhere")?)?;
    let agent = env!("CARGO_BIN_EXE_skimmer-agent");
    let (directory, root) = (text(sockets.path())?, text(&scratch.join("root"))?);
    let mut node = Node::new(&machine, &bin, agent, &directory, &root)?;
    node.configure(&format!("[metrics]\nlisten = '{ours}'\n"))?;
    node.start_daemon()?;

    let page =
        run(Command::new(agent).arg("http").arg(sockets.path().join("skimmerd.sock")).arg("/metrics"))?;
    let page_file = scratch.join("metrics");
    fs::write(&page_file, &page)?;
    let mut lint = Command::new(tools.join("promtool"));
    let lint = lint.args(["check", "metrics"]).stdin(File::open(&page_file)?).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&lint.stdout), String::from_utf8_lossy(&lint.stderr));
    ensure!(lint.status.success() && said.trim().is_empty(), "promtool: {said}");

    let prometheus = Prometheus::start(&tools, scratch, theirs, ours)?;
    let mount = text(&scratch.join("mount"))?;
    let result = (|| {
        node.mount(&format!("oci:{}", converted.display()), &mount, "fanotify")?;
        // Rates need two scrapes with something between them.
        wait(PATIENCE, "Prometheus has scraped us", || {
            Ok(!query(&prometheus, "skimmer_build_info")?.is_empty())
        })?;
        node.list(&mount)?;
        dashboard(&prometheus)
    })();
    node.umount(&mount)?;
    node.stop()?;
    result
}

/// Asks Prometheus whatever the dashboard asks; each must have an answer.
fn dashboard(server: &Prometheus) -> Result<()> {
    let dashboard: Value = serde_json::from_str(DASHBOARD)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut asked = 0;
    for panel in panels {
        for target in panel["targets"].as_array().context("no targets")? {
            let expression = target["expr"].as_str().context("no expression")?;
            let expression = expression.replace("$__rate_interval", "1m").replace("$instance", ".*");
            wait(PATIENCE, &format!("`{}` of {} has an answer", expression, panel["title"]), || {
                Ok(!query(server, &expression)?.is_empty())
            })?;
            asked += 1;
        }
    }
    ensure!(asked > 20, "only {asked} expressions");
    eprintln!("  {asked} expressions of {} panels have answers", panels.len());
    Ok(())
}

/// What promtool gets as the answer; series without a number are left out.
fn query(server: &Prometheus, expression: &str) -> Result<Vec<Value>> {
    let mut ask = Command::new(server.tools.join("promtool"));
    let answer = run(ask.args(["query", "instant", "--format", "json", &server.url, expression]))?;
    let found: Vec<Value> = serde_json::from_slice(&answer)?;
    // Not a number is what a quotient of nothing gives.
    Ok(found.into_iter().filter(|series| series["value"][1] != "NaN").collect())
}

struct Prometheus {
    child: Child,
    tools: PathBuf,
    url: String,
}

impl Prometheus {
    fn start(tools: &Path, scratch: &Path, own: SocketAddr, target: SocketAddr) -> Result<Self> {
        let config = format!(
            "global: {{ scrape_interval: 1s }}\nscrape_configs:\n- job_name: skimmer\n  static_configs: [{{ targets: ['{target}'] }}]\n"
        );
        let (file, log) = (scratch.join("prometheus.yml"), scratch.join("prometheus.log"));
        fs::write(&file, config)?;
        run(Command::new(tools.join("promtool")).args(["check", "config"]).arg(&file))?;
        let child = Command::new(tools.join("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", scratch.join("tsdb").display()))
            .arg(format!("--web.listen-address={own}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let prometheus = Self { child, tools: tools.to_owned(), url: format!("http://{own}") };
        wait(PATIENCE, "Prometheus answers", || Ok(query(&prometheus, "vector(1)").is_ok()))
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(prometheus)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
