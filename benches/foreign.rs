//! Somebody else takes away a rule, a member and a route: rule 3 of performance.md section 7.
//!
//! No goal may be met by no longer looking: what is deleted must be back within the interval at which the kernel is
//! looked at.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::rawset::RawSets;
use crate::results::Results;
use crate::world::{Agent, run, save};

/// One look costs a process.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes one of each away, all at once, and waits until they are back. `route` is the words of one that is there.
pub(crate) fn check(
    agent: &mut Agent,
    variant: &str,
    route: Option<&str>,
    limit: Duration,
    prefix: &str,
    results: &mut Results,
) -> Result<()> {
    let program = format!("iptables-{variant}");
    let saved = save(variant, Some("filter"))?;
    let rule = saved.iter().find(|line| line.starts_with("-A cali-pi-")).context("no chain of a policy")?;
    let chain = rule.split(' ').nth(1).context("no name of a chain")?;
    let list = || run(&program, &["-w", "-S", chain], b"");
    let rules = list()?;

    let mut sets = RawSets::open()?;
    let listed = run("ipset", &["save"], b"")?;
    let member = listed.lines().find_map(|line| {
        let mut words = line.strip_prefix("add cali40s:")?.split(' ');
        Some((format!("cali40s:{}", words.next()?), words.next()?.parse::<Ipv4Addr>().ok()?))
    });

    // An agent may have it back before anybody can look: that the tools succeed must do.
    let gone = Instant::now();
    run(&program, &["-w", "-D", chain, "1"], b"")?;
    if let Some((set, member)) = &member {
        sets.remove(set, [*member])?;
    }
    if let Some(route) = route {
        run("ip", &[&["route", "del"][..], &route.split(' ').collect::<Vec<_>>()].concat(), b"")?;
    }

    let mut back = [Some("rule"), member.as_ref().map(|_| "member"), route.map(|_| "route")];
    agent.await_until(limit, "what somebody else has deleted", |_| {
        for what in &mut back {
            let is_back = match *what {
                Some("rule") => list()? == rules,
                Some("member") => match &member {
                    Some((set, member)) => sets.contains(set, *member)?,
                    None => true,
                },
                Some(_) => match route {
                    Some(route) => {
                        !run("ip", &[&["route", "show"][..], &route.split(' ').collect::<Vec<_>>()].concat(), b"")?
                            .trim()
                            .is_empty()
                    }
                    None => true,
                },
                None => false,
            };
            if is_back && let Some(what) = what.take() {
                results.time(format!("{prefix}/foreign-{what}-repaired"), gone.elapsed());
            }
        }
        std::thread::sleep(PAUSE);
        Ok(back.iter().all(Option::is_none))
    })
}
