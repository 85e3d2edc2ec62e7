//! One walk over the kernel's table of flows: one list, then removal of what names an address of the batch.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Instant;

use nix::libc;

use super::wire::{self, Addresses, Flow};
use super::{Walk, WalkError};
use crate::netlink::{Channel, DumpEnd};

/// Removals in one datagram (crates.md N2).
const BATCH: usize = 200;

/// Removes all flows that name one of the addresses.
///
/// The list is read to its end before anything is removed: the kernel goes on from the last flow that it
/// sent, and is best served if that is still there.
pub(super) fn walk(channel: &mut Channel, addresses: &BTreeSet<IpAddr>) -> Result<Walk, WalkError> {
    let began = Instant::now();
    let wanted = Addresses::new(addresses);
    let mut walk = Walk::default();
    let flows = list(channel, &wanted, &mut walk)?;
    for batch in flows.chunks(BATCH) {
        let count = u32::try_from(batch.len()).unwrap_or(u32::MAX);
        let first = channel.sequences(count);
        let mut bytes = Vec::new();
        for (flow, sequence) in batch.iter().zip(first..) {
            wire::delete(flow, sequence, &mut bytes);
        }
        for outcome in channel.acknowledged(&bytes, first, count).map_err(failed)? {
            match outcome.map_err(|refusal| refusal.code) {
                Ok(()) => walk.removed += 1,
                // It ended by itself.
                Err(libc::ENOENT) => (),
                Err(code) => return Err(failed(io::Error::from_raw_os_error(code))),
            }
        }
    }
    walk.took = began.elapsed();
    Ok(walk)
}

fn list(channel: &mut Channel, wanted: &Addresses, walk: &mut Walk) -> Result<Vec<Flow>, WalkError> {
    let sequence = channel.sequences(1);
    let request = wire::list(wanted, sequence);
    let mut flows = Vec::new();
    let listed = channel.dump(&request, sequence, |payload| {
        walk.seen += 1;
        flows.extend(wire::flow_of(wanted, payload));
    });
    match listed {
        Ok(DumpEnd::Complete) => Ok(flows),
        Ok(DumpEnd::Interrupted | DumpEnd::Refused(libc::EINTR)) => {
            Err(WalkError::Failed("the table was rebuilt while it was read".to_owned()))
        }
        // No such subsystem, and no module that has it.
        Ok(DumpEnd::Refused(code @ (libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))) => {
            Err(WalkError::Unsupported(io::Error::from_raw_os_error(code).to_string()))
        }
        Ok(DumpEnd::Refused(code)) => Err(failed(io::Error::from_raw_os_error(code))),
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
            Err(WalkError::Unsupported(error.to_string()))
        }
        Err(error) => Err(failed(error)),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: io::Error) -> WalkError {
    WalkError::Failed(error.to_string())
}
