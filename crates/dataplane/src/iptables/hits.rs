//! How many packets our hook in raw PREROUTING has seen, for [`crate::canary`].

use std::io;

use model::Family;

use super::native::Native;
use super::parse::{is_our_chain, is_our_comment, rules_are_ours};
use super::variant::{Programs, search_path};
use crate::exec;
use crate::options::{Options, Variant};

/// Returns the sum over our rules there.
///
/// # Errors
///
/// If it cannot be read.
pub(super) async fn hits(family: Family, variant: Variant, options: &Options) -> io::Result<u64> {
    match variant {
        Variant::Nft => {
            let rules = match Native::new(family, options.netlink_timeout).rules("raw", Some("PREROUTING")) {
                Ok(rules) => rules,
                // Our hook is not there at all.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(error),
            };
            let ours = rules.iter().filter(|rule| {
                rule.jump.as_deref().is_some_and(is_our_chain) || rule.comments.iter().any(|text| is_our_comment(text))
            });
            Ok(ours.filter_map(|rule| rule.packets).sum())
        }
        Variant::Legacy => {
            let programs = Programs::find(family, variant, &search_path()).map_err(io::Error::other)?;
            let args = ["-c", "-t", "raw"].map(str::to_owned);
            let finished = exec::run(&programs.save, &args, "", options.program_timeout).await;
            Ok(counted(&finished.map_err(io::Error::other)?.stdout))
        }
    }
}

/// Sums up the packets of our rules in PREROUTING: `[packets:bytes] -A PREROUTING …`.
fn counted(listing: &str) -> u64 {
    let packets = listing.lines().filter_map(|line| {
        let (counters, rule) = line.strip_prefix('[')?.split_once("] ")?;
        let is_ours = rule.starts_with("-A PREROUTING ") && rules_are_ours(rule).any(|is_ours| is_ours);
        counters.split_once(':').filter(|_| is_ours)?.0.parse::<u64>().ok()
    });
    packets.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_our_rules_in_the_hook_are_summed_up() {
        let listing = "*raw\n:PREROUTING ACCEPT [100:6000]\n:cali-PREROUTING - [0:0]\n[9:540] -A PREROUTING -j ACCEPT\n\
                       [3:180] -A PREROUTING -m comment --comment \"cali:6gwbT8clXdHdC1b1\" -j cali-PREROUTING\n\
                       [2:120] -A cali-PREROUTING -j RETURN\n[1:60] -A PREROUTING -j cali-old\nCOMMIT\n";
        assert_eq!(counted(listing), 4);
    }
}
