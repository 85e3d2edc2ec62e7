//! What is in the kernel of a host, as lines that can be compared.
//!
//! Read with the operator's tools and not with the agent's drivers. Invariant: two kernels that treat every packet alike
//! give the same lines; counters, hash seeds and the order of chains and members do not show.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use testkit::netns::Netns;

use crate::agent::Variant;

/// The state of one host's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    lines: BTreeSet<String>,
    seeds: BTreeMap<String, String>,
}

const SETTINGS: &str = "\
for file in /proc/sys/net/ipv4/conf/tap*/{proxy_arp,route_localnet,forwarding,rp_filter} \
    /proc/sys/net/ipv4/neigh/tap*/proxy_delay /proc/sys/net/ipv6/conf/tap*/{accept_ra,proxy_ndp,forwarding}; do
  [ ! -e $file ] || echo $file $(cat $file)
done";

impl Kernel {
    /// Reads the state: both families' tables, sets, and the routes, neighbours and settings of `tap…` interfaces.
    ///
    /// # Errors
    ///
    /// If a tool fails.
    pub fn read(netns: &Netns, variant: Variant) -> Result<Self> {
        let variant = variant.word();
        let script = format!(
            "for tool in iptables ip6tables; do
               echo \"== $tool\"; $tool-{variant}-save
             done
             echo '== ipset'; ipset save
             echo '== route4'; ip -4 route show table main
             echo '== route6'; ip -6 route show table main
             echo '== neigh'; ip -4 neigh show nud permanent
             echo '== setting'; {SETTINGS}"
        );
        let output = netns.exec(&["bash", "-ec", &script])?;
        let mut kernel = Self::default();
        let mut section = String::new();
        let mut tables = Tables::default();
        for line in output.lines() {
            if let Some(title) = line.strip_prefix("== ") {
                section = title.to_owned();
                continue;
            }
            match section.as_str() {
                "iptables" | "ip6tables" => kernel.lines.extend(tables.line(&section, line)),
                "ipset" => kernel.set(line)?,
                "setting" => {
                    kernel.lines.insert(format!("setting {line}"));
                }
                // The kernel's own are the link-local ones.
                _ if line.contains(" dev tap") && !line.contains(" proto kernel ") => {
                    kernel.lines.insert(format!("{section} {}", line.trim_end()));
                }
                _ => {} // Not of a workload interface: the bed's own.
            }
        }
        Ok(kernel)
    }

    /// Takes a line of `ipset save`.
    fn set(&mut self, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            ["create", name, ref options @ ..] => {
                let mut kept = vec!["set", name];
                let mut options = options.iter();
                while let Some(&option) = options.next() {
                    match option {
                        // How the set is stored, not what it is.
                        "hashsize" | "bucketsize" => drop(options.next()),
                        "initval" => {
                            self.seeds.insert(name.to_owned(), options.next().copied().unwrap_or_default().to_owned());
                        }
                        other => kept.push(other),
                    }
                }
                self.lines.insert(kept.join(" "));
            }
            ["add", name, ref member @ ..] => {
                self.lines.insert(format!("set {name} has {}", member.join(" ")));
            }
            [] => {}
            _ => bail!("not a line of ipset save: {line}"),
        }
        Ok(())
    }

    /// Returns whether nothing of an agent is there: no chain, no set, no route.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(|line| line.starts_with("setting "))
    }

    /// Returns whether some line contains `text`.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        self.lines.iter().any(|line| line.contains(text))
    }

    /// Returns the lines that contain `text`.
    #[must_use]
    pub fn about(&self, text: &str) -> Vec<&str> {
        self.lines.iter().map(String::as_str).filter(|line| line.contains(text)).collect()
    }

    /// Returns how many chains of an agent there are, and how many rules in all.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let tables = self.lines.iter().filter(|line| line.starts_with("iptables ") || line.starts_with("ip6tables "));
        let (chains, rules): (Vec<_>, Vec<_>) = tables.partition(|line| line.contains(" chain "));
        (chains.iter().filter(|line| line.contains(" chain cali")).count(), rules.len())
    }

    /// Returns the random seed of each set, which changes when a set is made anew, even under the same name.
    #[must_use]
    pub fn seeds(&self) -> &BTreeMap<String, String> {
        &self.seeds
    }

    /// Returns the lines that only one of two states has, as `-` and `+` lines.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let gone = self.lines.difference(&other.lines).map(|line| format!("- {line}"));
        let new = other.lines.difference(&self.lines).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }
}

/// Where in the output of the `-save` tools we are.
#[derive(Debug, Default)]
struct Tables {
    table: String,
    lengths: BTreeMap<String, u32>,
}

impl Tables {
    /// Returns the comparable form of a line; an empty built-in chain that accepts is as good as none.
    fn line(&mut self, tool: &str, line: &str) -> Option<String> {
        if let Some(table) = line.strip_prefix('*') {
            table.clone_into(&mut self.table);
            self.lengths.clear();
            return None;
        }
        if let Some(chain) = line.strip_prefix(':') {
            let (name, rest) = chain.split_once(' ')?;
            let policy = rest.split(' ').next()?;
            return (policy != "ACCEPT").then(|| format!("{tool} {} chain {name} {policy}", self.table));
        }
        let rule = line.strip_prefix("-A ")?;
        let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
        let position = self.lengths.entry(chain.to_owned()).or_default();
        *position += 1;
        Some(format!("{tool} {} {chain} {position:03} {rule}", self.table))
    }
}

/// Reads until `enough` says so.
///
/// # Errors
///
/// If a tool fails, or if that is not so within ten seconds; the text has `what` was waited for.
pub fn wait_for(netns: &Netns, variant: Variant, what: &str, enough: impl Fn(&Kernel) -> bool) -> Result<Kernel> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let kernel = Kernel::read(netns, variant)?;
        if enough(&kernel) {
            return Ok(kernel);
        }
        anyhow::ensure!(
            std::time::Instant::now() < deadline,
            "{what}: not within ten seconds in {}:\n{}",
            netns.name(),
            kernel.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_kernels_give_equal_lines_and_every_difference_shows() {
        testkit::kernel_test!("ipset", "iptables-legacy-save", "iptables-nft-save");
        let (one, two) = (Netns::new("one").unwrap(), Netns::new("two").unwrap());
        for variant in Variant::BOTH {
            let tool = format!("iptables-{}", variant.word());
            let flush = format!("{tool} -w -F; {tool} -w -X; ipset destroy");
            for (netns, order) in [(&one, "x y"), (&two, "y x")] {
                let script = format!(
                    "for name in {order}; do
                       ipset create cali40$name hash:net; ipset add cali40$name 10.0.0.1; ipset add cali40$name 10.0.0.2
                       {tool} -w -N cali-$name; {tool} -w -A cali-$name -m set --match-set cali40$name src -j DROP
                     done"
                );
                netns.sh(&script).unwrap();
            }
            let (first, second) = (Kernel::read(&one, variant).unwrap(), Kernel::read(&two, variant).unwrap());
            assert_eq!(first.differences(&second), [""; 0]);
            assert_ne!(first.seeds(), second.seeds());
            assert!(first.mentions("cali-x 001 -m set --match-set cali40x src -j DROP"), "{first:?}");

            for (change, expected) in [
                ("ipset add cali40x 10.0.0.3".to_owned(), "+ set cali40x has 10.0.0.3"),
                (format!("{tool} -w -I cali-x -j RETURN"), "+ iptables filter cali-x 001 -j RETURN"),
                (format!("{tool} -w -P FORWARD DROP"), "+ iptables filter chain FORWARD DROP"),
            ] {
                two.sh(&change).unwrap();
                let differences = first.differences(&Kernel::read(&two, variant).unwrap());
                assert!(differences.iter().any(|line| line == expected), "{change}: {differences:?}");
            }
            one.sh(&flush).unwrap();
            two.sh(&format!("{tool} -w -P FORWARD ACCEPT; {flush}")).unwrap();
            assert!(Kernel::read(&one, variant).unwrap().is_empty());
        }
    }
}
