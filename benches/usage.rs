//! What a process and its children cost: processor time, memory, processes started.
//!
//! Children count from their start: those that have ended through their parent's account, those that run by
//! themselves (performance.md section 7, rule 4).

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// Ticks of `/proc/*/stat` in a second, on every architecture that this runs on.
const TICKS: f64 = 100.0;

/// Returns the processor seconds of a process with all its descendants, those that have ended included.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut ticks = 0.0;
    for pid in std::iter::once(pid).chain(descendants(pid)) {
        match stat_ticks(pid) {
            Ok(more) => ticks += more,
            // Ended in between: in its parent's account from now on.
            Err(_) if pid != std::process::id() && !Path::new("/proc").join(pid.to_string()).exists() => (),
            Err(error) => return Err(error),
        }
    }
    Ok(ticks / TICKS)
}

fn stat_ticks(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // Behind the name, which may hold anything, the third field comes first.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    // utime, stime, cutime, cstime
    Ok((14..=17).filter_map(field).sum())
}

/// Processes that run below a process.
pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut look = vec![pid];
    while let Some(pid) = look.pop() {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            look.extend(children.split_ascii_whitespace().filter_map(|word| word.parse::<u32>().ok()));
        }
        found.extend(look.iter().copied().filter(|child| *child != pid));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Returns a value of `/proc/<pid>/status` that is in kB, in megabytes of a million bytes.
pub(crate) fn megabytes(pid: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|text| text.parse::<f64>().ok());
    Ok(kilobytes.with_context(|| format!("no {field} of process {pid}"))? * 1024.0 / 1e6)
}

/// Returns how many processes and threads were ever started in the process namespace of `pid`, this look included.
pub(crate) fn started_in_namespace_of(pid: u32) -> Result<u64> {
    let output = Command::new("nsenter")
        .args(["--target", &pid.to_string(), "--pid", "--mount", "cat", "/proc/sys/kernel/ns_last_pid"])
        .output()
        .context("nsenter")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("ns_last_pid: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Returns the load of the machine as the kernel tells it.
pub(crate) fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_while_it_runs_and_after_it_has_ended() {
        let own = std::process::id();
        let before = cpu_seconds(own).unwrap();
        let spin = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done; read wait || true";
        let mut child = Command::new("sh")
            .args(["-c", spin])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        assert!(descendants(own).contains(&child.id()));
        let running = cpu_seconds(own).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        let ended = cpu_seconds(own).unwrap();
        assert!(running >= before + 0.05 && ended >= running - 0.02, "{before} {running} {ended}");
    }

    #[test]
    fn resident_memory_is_a_plausible_figure() {
        let megabytes = megabytes(std::process::id(), "VmRSS").unwrap();
        assert!((0.5..10_000.0).contains(&megabytes), "{megabytes}");
    }
}
