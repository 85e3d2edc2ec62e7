//! Whether a table is as it was listed, asked of real kernels and tools, each test in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and says in which case it was")]

mod host;

use std::fmt::Write as _;

use dataplane::iptables::backend::TableTransport as _;
use dataplane::iptables::lock::XtablesLock;
use dataplane::iptables::variant::{Programs, search_path};
use dataplane::iptables::{Features, TableRequest, TableResponse, TableTools};
use dataplane::{Options, Variant};
use program::{Family, Table};
use testkit::netns::in_new_netns;

use host::Host;

macro_rules! needs_tables {
    () => {
        testkit::kernel_test!(
            "iptables-legacy-restore",
            "iptables-nft-restore",
            "ip6tables-legacy-restore",
            "ip6tables-nft-restore",
            "nft"
        );
    };
}

fn every_host(test: impl Fn(Host) + Sync) {
    for variant in [Variant::Legacy, Variant::Nft] {
        for family in Family::BOTH {
            let host = Host { variant, family };
            println!("{host:?}");
            in_new_netns(|| test(host));
        }
    }
}

/// The programs of the host, as the drivers have them.
struct Tools {
    runtime: tokio::runtime::Runtime,
    tools: TableTools,
}

impl Tools {
    fn new(host: Host) -> Self {
        let options = Options::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let programs = Programs::find(host.family, host.variant, &search_path()).unwrap();
        let lock = XtablesLock::new(options.lock_file.clone(), options.lock_probe);
        let features = Features { restore_supports_lock: true, ..Features::default() };
        let tools = TableTools::new(host.family, host.variant, programs, &features, lock, &options);
        let tools = match host.variant {
            Variant::Nft => tools.reading_over_netlink(options.netlink_timeout),
            Variant::Legacy => tools,
        };
        let mut all = Self { runtime, tools };
        // The first listing of a legacy table takes no fingerprint.
        for table in Table::ALL {
            all.list(table);
        }
        all
    }

    fn list(&mut self, table: Table) -> String {
        match self.runtime.block_on(self.tools.perform(&TableRequest::Save { table, if_loaded: false })) {
            TableResponse::Done(text) => text,
            TableResponse::NotLoaded => String::new(),
            other @ (TableResponse::Listed(_)
            | TableResponse::Chains(_)
            | TableResponse::Refused { .. }
            | TableResponse::Broken(_)) => panic!("{other:?}"),
        }
    }

    fn write(&mut self, input: &str) {
        let answer = self.runtime.block_on(self.tools.perform(&TableRequest::Restore(input.into())));
        assert!(matches!(answer, TableResponse::Done(_)), "{answer:?}");
    }

    fn is_unchanged(&mut self, table: Table) -> bool {
        self.runtime.block_on(self.tools.is_unchanged(table))
    }

    fn foreign_changes(&mut self) -> Vec<dataplane::iptables::ForeignChange> {
        let _inside = self.runtime.enter();
        self.tools.foreign_changes()
    }
}

const RULES: &str = "*filter\n:cali-a - -\n:theirs - -\n-A FORWARD -j cali-a\n\
    -A cali-a -m comment --comment one -j MARK --set-mark 1\n-A cali-a -p 6 -j DROP\n-A theirs -j RETURN\nCOMMIT\n";

/// Ways of somebody else to change the filter table. The first leaves its size as it was.
const CHANGES: [&str; 7] = [
    "*filter\n-R cali-a 1 -m comment --comment two -j MARK --set-mark 1\nCOMMIT\n",
    "*filter\n-R cali-a 1 -m comment --comment two -j MARK --set-mark 2\nCOMMIT\n",
    "*filter\n-D cali-a 2\nCOMMIT\n",
    "*filter\n-A theirs -p 17 -j DROP\nCOMMIT\n",
    "*filter\n:empty - -\nCOMMIT\n",
    "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n",
    "*filter\n-F\nCOMMIT\n",
];

/// The refresh is there to find what nobody told of: whatever somebody does, the proof is gone until the next listing.
#[test]
fn a_table_is_unchanged_until_somebody_changes_it() {
    needs_tables!();
    every_host(|host| {
        host.restore(RULES);
        let mut tools = Tools::new(host);
        for change in CHANGES {
            tools.list(Table::Filter);
            for _ in 0..2 {
                assert!(tools.is_unchanged(Table::Filter), "before {change}");
            }
            host.restore(change);
            assert!(!tools.is_unchanged(Table::Filter), "{change}");
            assert!(!tools.is_unchanged(Table::Filter), "asking changes nothing");
        }
    });
}

#[test]
fn what_we_write_is_proven_by_a_listing_only() {
    needs_tables!();
    every_host(|host| {
        host.restore(RULES);
        let mut tools = Tools::new(host);
        tools.list(Table::Filter);
        tools.write("*nat\n:cali-b - -\nCOMMIT\n");
        assert!(tools.is_unchanged(Table::Filter));
        tools.write("*filter\n-A cali-a -j RETURN\nCOMMIT\n");
        assert!(!tools.is_unchanged(Table::Filter));
        assert!(tools.list(Table::Filter).contains("-A cali-a -j RETURN"));
        assert!(tools.is_unchanged(Table::Filter));
    });
}

/// Other tables and families change all the time on a busy host: the table need not be listed for their sake.
#[test]
fn what_others_do_elsewhere_leaves_the_proof() {
    needs_tables!();
    every_host(|host| {
        host.restore(RULES);
        let mut tools = Tools::new(host);
        tools.list(Table::Filter);
        let other = Host { family: if host.family == Family::V4 { Family::V6 } else { Family::V4 }, ..host };
        for round in 0..3 {
            host.restore("*nat\n:theirs - -\n-A theirs -j RETURN\nCOMMIT\n");
            other.restore("*filter\n-A FORWARD -j DROP\nCOMMIT\n");
            host.nft(&format!(
                "add table inet other{round}\nadd chain inet other{round} a\nadd rule inet other{round} a drop\n"
            ));
            assert!(tools.is_unchanged(Table::Filter), "{round}");
        }
        host.restore(CHANGES[0]);
        assert!(!tools.is_unchanged(Table::Filter));
    });
}

/// The kernel drops notifications that nobody fetches. What was among them nobody knows.
#[test]
fn after_lost_notifications_nothing_is_proven_until_the_next_listing() {
    needs_tables!();
    for family in Family::BOTH {
        let host = Host { variant: Variant::Nft, family };
        in_new_netns(|| {
            host.restore(RULES);
            let mut tools = Tools::new(host);
            tools.list(Table::Filter);
            tools.foreign_changes();
            assert!(tools.is_unchanged(Table::Filter));
            let mut flood = "add table inet other\nadd chain inet other a\nflush chain inet other a\n".to_owned();
            for number in 0..1_500 {
                writeln!(flood, "add rule inet other a tcp dport {number} drop comment \"{number:0>100}\"").unwrap();
            }
            // Rules that go are told of, too: about 35 megabytes.
            for _ in 0..30 {
                host.nft(&flood);
            }
            // In the middle of what is lost.
            host.restore(CHANGES[0]);
            assert!(!tools.is_unchanged(Table::Filter));
            assert_eq!(
                tools.foreign_changes().len(),
                Table::ALL.len(),
                "all of it is in doubt, or the flood was too small"
            );
            assert!(!tools.is_unchanged(Table::Filter));
            assert!(tools.list(Table::Filter).contains("two"));
            assert!(tools.is_unchanged(Table::Filter));
        });
    }
}

/// One listing serves all tables, but not longer than nothing changes.
#[test]
fn a_listing_of_all_tables_is_not_kept_beyond_the_next_transaction() {
    needs_tables!();
    for family in Family::BOTH {
        let host = Host { variant: Variant::Nft, family };
        in_new_netns(|| {
            let mut tools = Tools::new(host);
            assert_eq!(tools.list(Table::Raw), "", "the kernel does not have it");
            host.restore(RULES);
            host.restore("*nat\n:theirs - -\n-A theirs -j RETURN\nCOMMIT\n*raw\n:theirs - -\nCOMMIT\n");
            let plain = |text: &str| {
                let lines = text.lines().filter(|line| !line.starts_with('#'));
                lines.map(|line| format!("{}\n", line.split(" [").next().unwrap_or_default())).collect::<String>()
            };
            for table in Table::ALL {
                let expected =
                    if table == Table::Mangle { String::new() } else { plain(&host.listing(table.as_str())) };
                assert_eq!(plain(&tools.list(table)), expected, "{table:?}");
            }
            for change in CHANGES {
                tools.list(Table::Raw);
                host.restore(change);
                assert_eq!(plain(&tools.list(Table::Filter)), plain(&host.listing("filter")), "{change}");
                assert!(tools.is_unchanged(Table::Filter));
            }
        });
    }
}
