//! Builds the process, part by part, and waits until one of them or a signal ends it.
//!
//! ```text
//!  main thread                          graph thread           apply thread
//!  datastore, interfaces ─► backlog ─1► Graph ─► Compiler ─2─► ApplyLoop ─► kernel
//!  signals                                      ◄──"ready"─3── │
//!          ◄────────────────── 4 what came of it ──────────────┘
//! ```
//!
//! Everything that crosses is an owned value in a channel; each of the four hand-overs has at most
//! one item on its way, because the receiver asks for it.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use compiler::{Compiler, Marks};
use dataplane::ApplyLoop;
use dataplane::links::LinkMonitor;
use datastore::Datastore;
use graph::Graph;
use settings::{Note, Resolved};
use telemetry::Log;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use crate::config_watch::{self, ConfigWatch};
use crate::exit::Ended;
use crate::graph_thread::{GraphThread, ToGraph};
use crate::local::Local;
use crate::main_loop::{Inputs, MainLoop};
use crate::signals::Signals;
use crate::unplugged::Unplugged;
use crate::{apply_thread, options, parts, unplugged};

/// Time between two attempts to start with a stored configuration that is wrong.
const RETRY: Duration = Duration::from_secs(1);

/// How long the threads have to end; together with everything else less than a second.
const GRACE: Duration = Duration::from_millis(800);

/// How far each source may be ahead of the main loop, in messages.
const AHEAD: usize = 16;

/// Runs the agent.
///
/// # Errors
///
/// What keeps the agent from starting at all.
pub(crate) async fn run(local: Local, log: Log) -> anyhow::Result<Ended> {
    let started = Instant::now();
    let mut signals = Signals::new().context("listening for signals")?;

    let datastore = Datastore::new(options::connect(&local.connection)).await?;
    let resolved = tokio::select! {
        biased;
        ended = signals.next() => {
            ended.log();
            linger(&ended, &mut signals).await;
            return Ok(ended);
        }
        resolved = configure(&datastore, &local) => resolved,
    };
    let settings = &resolved.settings;
    let compiler_options = options::compiler(settings)?;
    log.set_level(options::level(settings.log_severity));
    announce(&local, &resolved, &compiler_options.marks);
    if settings.is_passive() {
        warn!(variant = settings.variant, "another variant of the product is in charge; nothing is programmed");
    }

    let graph = Graph::new(settings.hostname.as_str().into());
    let dataplane_options = options::dataplane(settings);
    let link_monitor = LinkMonitor::new(&dataplane_options);
    let apply = ApplyLoop::new(dataplane_options);

    let (to_graph, graph_inbox) = std::sync::mpsc::channel();
    let (messages, from_threads) = mpsc::channel(AHEAD);
    let (batches, batch_inbox) = mpsc::channel(1);
    let (stop, stopping) = watch::channel(false);

    let graph_thread = parts::spawn("graph", messages.clone(), {
        let messages = messages.clone();
        let thread = GraphThread::new(graph, Compiler::new(compiler_options));
        move || thread.run(&graph_inbox, &batches, &messages)
    })?;
    let apply_thread = parts::spawn("apply", messages.clone(), {
        let ends = apply_thread::Ends {
            batches: batch_inbox,
            ready: to_graph.clone(),
            messages: messages.clone(),
            stop: stopping,
        };
        move || apply_thread::run(apply, ends)
    })?;
    if let Some(after) = settings.panic_after {
        parts::spawn("fault injection", messages, move || {
            std::thread::sleep(after);
            panic!("DebugPanicAfter is set");
        })?;
    }

    let (to_main, from_datastore) = mpsc::channel(AHEAD);
    let follow = datastore.run(options::convert(settings), to_main);
    let (link_events, links) = mpsc::channel(AHEAD);
    let watch_links = link_monitor.run(link_events);
    let mut inputs = Inputs { datastore: from_datastore, links, messages: from_threads };
    let passive = settings.is_passive();
    let config = ConfigWatch::new(local.raw, resolved);
    let unplugged = Unplugged::new(unplugged::LIMIT);
    let mut main_loop = MainLoop::new(config, to_graph.clone(), passive, started, unplugged);

    let ended = tokio::select! {
        biased;
        ended = signals.next() => ended,
        ended = main_loop.run(&mut inputs) => ended,
        () = follow => Ended::PartFailed("datastore", anyhow::anyhow!("the watch has ended")),
        watched = watch_links => Ended::PartFailed("links", match watched {
            Ok(()) => anyhow::anyhow!("the monitor has ended"),
            Err(error) => error.into(),
        }),
    };
    ended.log();
    // Threads that wait for a reader or a sender of theirs are freed by its end.
    drop((inputs, main_loop));
    to_graph.send(ToGraph::Stop).ok();
    stop.send(true).ok();
    parts::wait(&[graph_thread, apply_thread], GRACE).await;
    linger(&ended, &mut signals).await;
    Ok(ended)
}

/// Delays the exit if that is wanted; a signal cuts it short.
async fn linger(ended: &Ended, signals: &mut Signals) {
    if let Some(pause) = ended.pause() {
        tokio::select! {
            () = signals.stop() => (),
            () = tokio::time::sleep(pause) => (),
        }
    }
}

/// Waits for the datastore and merges what is stored there with what is local. A stored
/// configuration that is wrong is waited for too: whoever wrote it can mend it.
async fn configure(datastore: &Datastore, local: &Local) -> Resolved {
    let mut said = String::new();
    loop {
        let stored = datastore.wait_ready(&local.resolved.settings.hostname).await;
        match config_watch::with_datastore(&local.raw, &stored).resolve() {
            Ok(resolved) => return resolved,
            Err(invalid) => {
                let text = invalid.to_string();
                if text != said {
                    error!(error = text, "stored configuration is wrong; waiting for a better one");
                    said = text;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The one line that says what this process is and what it runs with, and what is odd about that.
fn announce(local: &Local, resolved: &Resolved, marks: &Marks) {
    let settings = &resolved.settings;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        host = settings.hostname,
        etcd = local.connection.endpoints.join(","),
        iptables = resolved.get("IptablesBackend").map(|(_, value)| tracing::field::display(value)),
        families = if settings.ipv6 { "4,6" } else { "4" },
        prefixes = settings.interface_prefixes.join(","),
        openstack = settings.is_openstack(),
        marks = format_args!(
            "accept={:#x} pass={:#x} drop={:#x} scratch={:#x},{:#x} endpoint={:#x}",
            marks.accept, marks.pass, marks.drop, marks.scratch0, marks.scratch1, marks.endpoint
        ),
        "calico-felix starts"
    );
    for warning in &local.warnings {
        warn!(param = warning.param, "{}", warning.message);
    }
    for note in &resolved.notes {
        log_note(note);
    }
}

/// One line for each parameter that does not do what whoever set it may expect.
fn log_note(note: &Note) {
    match note {
        Note::Unknown { name, source } => info!(param = name, %source, "unknown parameter"),
        Note::Empty { name, source } => info!(param = name, %source, "parameter without a value does not count"),
        Note::NotLocal { param, source } => {
            warn!(param, %source, "parameter counts only in the environment or the config file");
        }
        Note::UsesDefault { param, source, reason } => {
            warn!(param, %source, reason, "parameter is invalid, its default counts");
        }
        Note::NotEffective { param, source } => info!(param, %source, "parameter has no effect yet"),
        Note::NotSupported { param, source } => warn!(param, %source, "parameter asks for what is not supported"),
        Note::NoEffect { param, source } => info!(param, %source, "parameter has no effect in this agent"),
        Note::Retired { param, source, replacement } => {
            warn!(param, %source, replacement, "parameter no longer exists");
        }
    }
}
