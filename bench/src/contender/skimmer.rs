//! Skimmer's own contenders, everything that is to be read already there.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kernel_tests::skimmer::Node;
use serde_json::Value;

use super::{LONG, Mounted, Outcome, SHORT, Stage};
use crate::data::UNREAD;
use crate::probe::Sum;

impl<'a> Stage<'a> {
    pub(super) fn skimmer(&self, name: &str) -> Result<Outcome<'a>> {
        let mode = name.trim_start_matches("skimmer-").trim_end_matches("-marked");
        let directory = format!("{}/{name}.run", self.work);
        let root = format!("{}/{name}.cache", self.work);
        let agent = format!("{}/skimmer-agent", self.programs);
        let mut node = Node::new(self.machine, &self.programs, &agent, &directory, &root)?;
        node.start_daemon()?;
        // A local mount needs data that another mode has brought.
        let fill = if mode == "local" { "fanotify" } else { mode };
        for wanted in [mode, fill] {
            let status = node.status()?;
            let modes = status["modes"].as_array().context("status lists no modes")?;
            let report = modes.iter().find(|report| report["mode"] == wanted);
            let report = report.with_context(|| format!("skimmerd knows of no mode {wanted}"))?;
            if report["usable"] != true {
                let why = report["reason"].as_str().unwrap_or("no reason given").to_owned();
                return Ok(Outcome::Skipped(why));
            }
        }
        let point = self.mount_point(name)?;
        let image = format!("oci:{}", self.layout);
        node.mount(&image, &point, fill).with_context(|| node.log())?;
        // What is not read stays away: that keeps the mark on.
        let marked = name.ends_with("-marked");
        let mut arguments = vec!["sum", point.as_str()];
        if marked {
            arguments.extend(["--without", UNREAD]);
        }
        let _: Sum = self.probe(&arguments).with_context(|| node.log())?;
        if !marked {
            settle(&node, fill)?;
        }
        if mode != fill {
            node.umount(&point)?;
            node.mount(&image, &point, mode).with_context(|| node.log())?;
        }
        Ok(self.mounted(name, point, Some(node), Vec::new()))
    }
}

impl Mounted<'_> {
    /// Requests of the kernel that the daemon saw so far; nothing for contenders that are not ours.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn kernel_requests(&self) -> Result<Option<f64>> {
        self.node.as_ref().map(|node| node.counter("skimmer_kernel_requests_total")).transpose()
    }

    /// Whether the contender still is what its name says: marked, or complete.
    ///
    /// # Errors
    /// It is not, or the daemon does not answer.
    pub fn still_itself(&self) -> Result<()> {
        let Some(node) = self.node.as_ref().filter(|_| self.name.contains("fanotify")) else { return Ok(()) };
        let status = node.status()?;
        let watched = blobs(&status)?.iter().any(|blob| blob["watched"] == true);
        let marked = self.name.ends_with("-marked");
        ensure!(
            watched == marked,
            "{}: its data files are {}marked",
            self.name,
            if watched { "" } else { "not " }
        );
        Ok(())
    }
}

fn blobs(status: &Value) -> Result<&Vec<Value>> {
    status["blobs"].as_array().context("status lists no blobs")
}

/// Waits until every referenced byte is ready and, on fanotify, no file is marked any more.
fn settle(node: &Node<'_>, mode: &str) -> Result<()> {
    let deadline = Instant::now() + SHORT.min(LONG);
    loop {
        let status = node.status()?;
        let complete = |blob: &Value| {
            blob["ready_bytes"] == blob["referenced_bytes"]
                && (mode != "fanotify" || blob["watched"] == false)
        };
        if blobs(&status)?.iter().all(complete) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "after a full read blobs are not complete: {status}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
