//! What processes use, as /proc tells it.

use std::fs;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Sums over processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Resident bytes (`VmRSS`).
    pub rss: f64,
    /// The most that was resident (`VmHWM`), bytes.
    pub peak: f64,
    /// Open descriptors.
    pub open_files: f64,
    /// Threads.
    pub threads: f64,
    /// Seconds of CPU, user and system.
    pub cpu_seconds: f64,
    /// Context switches of all threads, voluntary and not.
    pub switches: f64,
}

/// What `pids` use together.
///
/// # Errors
/// One is not there.
pub fn usage(pids: &[u32]) -> Result<Usage> {
    let mut total = Usage::default();
    for pid in pids {
        let one = of(*pid).with_context(|| format!("process {pid}"))?;
        total.rss += one.rss;
        total.peak += one.peak;
        total.open_files += one.open_files;
        total.threads += one.threads;
        total.cpu_seconds += one.cpu_seconds;
        total.switches += one.switches;
    }
    Ok(total)
}

/// Seconds of CPU that `pid` used, user and system; of one that ended, too, until it is waited for.
///
/// # Errors
/// It is not there.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(cpu_ticks(&stat)? / f64::from(u32::try_from(rustix::param::clock_ticks_per_second())?))
}

fn of(pid: u32) -> Result<Usage> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut usage = Usage {
        rss: field(&status, "VmRSS:")? * 1024.0,
        peak: field(&status, "VmHWM:")? * 1024.0,
        threads: field(&status, "Threads:")?,
        cpu_seconds: cpu_seconds(pid)?,
        ..Usage::default()
    };
    for _ in fs::read_dir(format!("/proc/{pid}/fd"))? {
        usage.open_files += 1.0;
    }
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        usage.switches +=
            field(&status, "voluntary_ctxt_switches:")? + field(&status, "nonvoluntary_ctxt_switches:")?;
    }
    Ok(usage)
}

/// The number after `name` at the start of a line.
fn field(status: &str, name: &str) -> Result<f64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name));
    let rest = rest.with_context(|| format!("no {name} in its status"))?;
    Ok(rest.split_whitespace().next().unwrap_or_default().parse()?)
}

/// utime + stime: fields 14 and 15 of proc(5), counted behind the name, which may hold anything.
fn cpu_ticks(stat: &str) -> Result<f64> {
    let (_, rest) = stat.rsplit_once(')').context("no name in its stat")?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || -> Result<f64> { Ok(fields.next().context("its stat is short")?.parse()?) };
    Ok(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let usage = usage(&[std::process::id()]).unwrap();
        assert!(
            usage.rss > 0.0 && usage.peak >= usage.rss && usage.threads >= 1.0 && usage.open_files >= 1.0
        );
        assert!(super::usage(&[u32::MAX]).is_err());
    }

    #[test]
    fn names_with_brackets_do_not_shift_fields() {
        let stat = "1 (a) b) S 0 0 0 0 0 0 0 0 0 0 7 5 0 0";
        assert_eq!(cpu_ticks(stat).unwrap(), 12.0);
    }
}
