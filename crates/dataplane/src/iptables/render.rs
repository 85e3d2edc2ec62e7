//! The text of rules, as `iptables-restore` takes it (netfilter.md 4).
//!
//! Fed by `program` rules, feeds the table driver and [`super::hash`]. Everything is appended to a
//! buffer that the caller owns, so that writing a table of any size allocates once.
//!
//! Invariant: whatever a rule holds, its text is one line, every word of it is one word to the tool,
//! and no quote is left open. The compiler refuses odd names with a complaint; the replacing done here
//! is the last line of defence against text that a datastore might try to smuggle in.

use std::fmt::{self, Write as _};
use std::net::IpAddr;

use model::{Family, PortRange};
use program::{Action, ConnState, InterfaceMatch, Match, Rate, RateUnit, Rule, Side};

use super::features::Features;
use super::hash::RuleHash;

/// Longest comment in bytes (netfilter.md 4.3).
const MAX_COMMENT: usize = 256;

/// Longest text after the hash comment. The tools read lines into a buffer of 10,240 bytes and take
/// what does not fit for a line of its own, so that a longer rule would not only be wrong: whoever
/// chose its text would write the next one.
const MAX_TAIL: usize = 10_000;

/// Most words after the hash comment. The tools take 255 in a line.
const MAX_WORDS: usize = 240;

/// Words of one comment.
const COMMENT_WORDS: usize = 4;

/// So many comments of the greatest length always fit, beside any rule that the compiler makes.
const FEW_COMMENTS: usize = 4;

/// Longest prefix of kernel log records in bytes: with the two that are added it must stay below 1,023,
/// from where on the tools refuse a word. The kernel keeps 29; more is written only so that the hashes
/// of usual rules are the reference's.
const MAX_LOG_PREFIX: usize = 1000;

/// Longest name of an interface in bytes.
const MAX_INTERFACE: usize = 15;

/// Bytes of a packet that are handed to the flow log.
const NFLOG_BYTES: u32 = 80;

/// Returns comments, matches and action of a rule: its line without chain and hash comment.
pub fn rule_fragment(rule: &Rule, features: &Features) -> String {
    let mut text = String::with_capacity(128);
    write_tail(&mut text, rule, features);
    if text.starts_with(' ') {
        text.remove(0);
    }
    text
}

/// Returns a complete line of restore input. `op` is everything before the hash comment, for instance
/// `-A cali-FORWARD` or `-R cali-FORWARD 3`.
pub fn rule_line(op: &str, rule: &Rule, hash: RuleHash, features: &Features) -> String {
    let mut line = String::with_capacity(192);
    write_rule_line(&mut line, op, rule, hash, features);
    line
}

/// Appends what [`rule_line`] returns. No line end.
pub fn write_rule_line(out: &mut String, op: &str, rule: &Rule, hash: RuleHash, features: &Features) {
    out.push_str(op);
    out.push_str(" -m comment --comment \"cali:");
    out.push_str(hash.as_str());
    out.push('"');
    write_tail(out, rule, features);
}

/// Appends comments, matches and action of a rule, each word with a blank before it.
///
/// Comments that make the line longer than the tools read are left out. A rule that is too long without
/// any drops what gets there.
pub fn write_tail(out: &mut String, rule: &Rule, features: &Features) {
    let start = out.len();
    for comment in rule.comments.iter().take(FEW_COMMENTS) {
        push_whole_comment(out, comment);
    }
    let end_of_comments = out.len();
    for condition in &rule.matches {
        push_match(out, condition);
    }
    if let Some(action) = &rule.action {
        push_action(out, action, features);
    }
    let text = out.get(start..).unwrap_or_default();
    // Most lines are far too short to hold too many words.
    if text.len() > MAX_WORDS && !fits(text) {
        out.truncate(start);
        push_whole_comment(out, "Too long to be written");
        push_action(out, &Action::Drop, features);
    } else if rule.comments.len() > FEW_COMMENTS {
        insert_comments(out, start, end_of_comments, &rule.comments);
    }
}

/// Adds the comments that have not been written yet at a place in the text, as far as they fit.
fn insert_comments(out: &mut String, start: usize, at: usize, comments: &[String]) {
    let rest = out.split_off(at);
    let (mut length, mut n_words) =
        (out.len() - start + rest.len(), words(out.get(start..).unwrap_or_default()) + words(&rest));
    for comment in comments.iter().skip(FEW_COMMENTS) {
        let before = out.len();
        push_whole_comment(out, comment);
        length += out.len() - before;
        n_words += COMMENT_WORDS;
        if length > MAX_TAIL || n_words > MAX_WORDS {
            out.truncate(before);
            break;
        }
    }
    out.push_str(&rest);
}

fn fits(text: &str) -> bool {
    text.len() <= MAX_TAIL && words(text) <= MAX_WORDS
}

/// Counts words as the tools do: every one has a blank before it that is not in quotes.
fn words(text: &str) -> usize {
    // No text holds a quote: what lies outside of quotes is every other piece.
    text.split('"').step_by(2).map(|outside| outside.bytes().filter(|byte| *byte == b' ').count()).sum()
}

fn push_whole_comment(out: &mut String, comment: &str) {
    out.push_str(" -m comment --comment \"");
    push_comment(out, comment);
    out.push('"');
}

fn push_match(out: &mut String, condition: &Match) {
    match condition {
        Match::MarkClear(mask) => show(out, format_args!(" -m mark --mark 0/{mask:#x}")),
        Match::MarkAny(mask) => show(out, format_args!(" -m mark ! --mark 0/{mask:#x}")),
        Match::MarkIs { value, mask } => show(out, format_args!(" -m mark --mark {value:#x}/{mask:#x}")),
        Match::MarkIsNot { value, mask } => show(out, format_args!(" -m mark ! --mark {value:#x}/{mask:#x}")),
        Match::In(interface) => push_interface(out, " --in-interface ", interface),
        Match::Out(interface) => push_interface(out, " --out-interface ", interface),
        Match::ReversePathFailed => out.push_str(" -m rpfilter --invert --validmark"),
        Match::LocalAddress { side, negated, limit_out } => {
            out.push_str(" -m addrtype");
            push_not(out, *negated);
            out.push_str(match side {
                Side::Source => " --src-type LOCAL",
                Side::Destination => " --dst-type LOCAL",
            });
            if *limit_out {
                out.push_str(" --limit-iface-out");
            }
        }
        Match::ConnTrack { negated, states } => {
            out.push_str(" -m conntrack");
            push_not(out, *negated);
            out.push_str(" --ctstate ");
            push_list(out, states, |out, state| out.push_str(state_word(*state)));
        }
        Match::Protocol { negated, protocol } => {
            push_not(out, *negated);
            out.push_str(" -p ");
            match protocol {
                program::Protocol::Number(number) => show(out, format_args!("{number}")),
                program::Protocol::Name(name) => push_word(out, name),
            }
        }
        Match::Net { side, negated, net } => {
            push_not(out, *negated);
            show(out, format_args!("{}{net}", side_option(*side)));
        }
        Match::Address { side, address } => show(out, format_args!("{}{address}", side_option(*side))),
        Match::Set { side, negated, set, with_port } => {
            out.push_str(" -m set");
            push_not(out, *negated);
            out.push_str(" --match-set ");
            out.push_str(set.as_str());
            out.push_str(match (side, with_port) {
                (Side::Source, false) => " src",
                (Side::Source, true) => " src,src",
                (Side::Destination, false) => " dst",
                (Side::Destination, true) => " dst,dst",
            });
        }
        Match::Ports { side, negated, ports } => {
            out.push_str(" -m multiport");
            push_not(out, *negated);
            out.push_str(match side {
                Side::Source => " --source-ports ",
                Side::Destination => " --destination-ports ",
            });
            push_list(out, ports, |out, range| push_ports(out, *range, ':'));
        }
        Match::DestinationPort(port) => show(out, format_args!(" --dport {port}")),
        Match::Icmp { family, negated, icmp } => {
            out.push_str(match family {
                Family::V4 => " -m icmp",
                Family::V6 => " -m icmp6",
            });
            push_not(out, *negated);
            out.push_str(match family {
                Family::V4 => " --icmp-type ",
                Family::V6 => " --icmpv6-type ",
            });
            show(out, format_args!("{}", icmp.kind));
            if let Some(code) = icmp.code {
                show(out, format_args!("/{code}"));
            }
        }
        Match::Limit { rate, burst } => push_limit(out, *rate, *burst),
    }
}

fn push_action(out: &mut String, action: &Action, features: &Features) {
    match action {
        Action::Accept => out.push_str(" --jump ACCEPT"),
        Action::Drop => out.push_str(" --jump DROP"),
        Action::Return => out.push_str(" --jump RETURN"),
        Action::Reject => out.push_str(" --jump REJECT"),
        Action::Jump(chain) => {
            out.push_str(" --jump ");
            out.push_str(chain.as_str());
        }
        Action::Goto(chain) => {
            out.push_str(" --goto ");
            out.push_str(chain.as_str());
        }
        Action::SetMark(mark) => show(out, format_args!(" --jump MARK --set-mark {mark:#x}/{mark:#x}")),
        Action::ClearMark(mark) => show(out, format_args!(" --jump MARK --set-mark 0/{mark:#x}")),
        Action::SetMaskedMark { value, mask } => {
            show(out, format_args!(" --jump MARK --set-mark {value:#x}/{mask:#x}"));
        }
        Action::NoTrack => out.push_str(" --jump NOTRACK"),
        Action::Log { prefix } => {
            out.push_str(" --jump LOG --log-prefix \"");
            push_quoted(out, prefix);
            out.push_str(": \" --log-level 5");
        }
        Action::NfLog { group, prefix } => {
            show(out, format_args!(" --jump NFLOG --nflog-group {group} --nflog-prefix "));
            push_word(out, prefix);
            // Kernels before 4.8 and tools before 1.6.1 know only the older option, which limits
            // nothing in fact (netfilter.md 18.2).
            let option = if features.nflog_size { "--nflog-size" } else { "--nflog-range" };
            show(out, format_args!(" {option} {NFLOG_BYTES}"));
        }
        Action::MarkWithinRate { rate, burst, mark } => {
            push_limit(out, *rate, *burst);
            show(out, format_args!(" --jump MARK --set-mark {mark:#x}/{mark:#x}"));
        }
        Action::RejectConnectionsAbove(count) => show(
            out,
            format_args!(
                " -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m connlimit --connlimit-above {count} \
                 --connlimit-mask 0 -j REJECT --reject-with tcp-reset"
            ),
        ),
        Action::Dnat { to, port } => {
            out.push_str(" --jump DNAT --to-destination ");
            let ports = port.map(PortRange::single);
            push_address_and_ports(out, *to, ports);
        }
        Action::Snat { to, ports } => {
            out.push_str(" --jump SNAT --to-source ");
            push_address_and_ports(out, *to, *ports);
            if features.snat_random_fully {
                out.push_str(" --random-fully");
            }
        }
        Action::Masquerade { ports } => {
            out.push_str(" --jump MASQUERADE");
            if let Some(ports) = ports {
                out.push_str(" --to-ports ");
                push_ports(out, *ports, '-');
            }
            if features.masquerade_random_fully {
                out.push_str(" --random-fully");
            }
        }
        Action::Dscp(value) => show(out, format_args!(" --jump DSCP --set-dscp {value}")),
    }
}

fn push_not(out: &mut String, negated: bool) {
    if negated {
        out.push_str(" !");
    }
}

fn push_interface(out: &mut String, option: &str, interface: &InterfaceMatch) {
    out.push_str(option);
    match interface {
        InterfaceMatch::Exact(name) => push_word(out, name),
        InterfaceMatch::Prefix(prefix) => {
            push_word(out, prefix);
            // A name of full length begins no other, and the tools refuse the sign behind it.
            if prefix.len() < MAX_INTERFACE {
                out.push('+');
            }
        }
    }
}

const fn side_option(side: Side) -> &'static str {
    match side {
        Side::Source => " --source ",
        Side::Destination => " --destination ",
    }
}

const fn state_word(state: ConnState) -> &'static str {
    match state {
        ConnState::New => "NEW",
        ConnState::Related => "RELATED",
        ConnState::Established => "ESTABLISHED",
        ConnState::Invalid => "INVALID",
        ConnState::Dnat => "DNAT",
    }
}

fn push_limit(out: &mut String, rate: Rate, burst: u32) {
    let unit = match rate.per {
        RateUnit::Sec => "sec",
        RateUnit::Second => "second",
        RateUnit::Minute => "minute",
        RateUnit::Hour => "hour",
        RateUnit::Day => "day",
    };
    show(out, format_args!(" -m limit --limit {}/{unit}", rate.count));
    if burst > 0 {
        show(out, format_args!(" --limit-burst {burst}"));
    }
}

/// An address takes brackets only where a port follows an IPv6 address.
fn push_address_and_ports(out: &mut String, address: IpAddr, ports: Option<PortRange>) {
    match (address, ports) {
        (address, None) => show(out, format_args!("{address}")),
        (IpAddr::V4(address), Some(ports)) => {
            show(out, format_args!("{address}:"));
            push_ports(out, ports, '-');
        }
        (IpAddr::V6(address), Some(ports)) => {
            show(out, format_args!("[{address}]:"));
            push_ports(out, ports, '-');
        }
    }
}

fn push_ports(out: &mut String, range: PortRange, between: char) {
    show(out, format_args!("{}", range.first));
    if range.last != range.first {
        show(out, format_args!("{between}{}", range.last));
    }
}

fn push_list<T>(out: &mut String, items: &[T], mut push: impl FnMut(&mut String, &T)) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        push(out, item);
    }
}

/// Netfilter.md 4.3, item 2: one `_` per character outside the class, then cut.
fn push_comment(out: &mut String, comment: &str) {
    let plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '_' | ' ' | '@' | '%' | '+' | '=' | ':' | ',' | '.' | '/' | '-')
    };
    out.extend(comment.chars().take(MAX_COMMENT).map(|c| if plain(c) { c } else { '_' }));
}

/// Text between quotes: blanks are fine, what could end or escape the quote is replaced.
fn push_quoted(out: &mut String, text: &str) {
    let plain = |c: char| c == ' ' || (c.is_ascii_graphic() && c != '"' && c != '\\');
    out.extend(text.chars().take(MAX_LOG_PREFIX).map(|c| if plain(c) { c } else { '_' }));
}

/// A word without quotes around it.
fn push_word(out: &mut String, word: &str) {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\'' | '\\');
    if word.chars().all(plain) {
        out.push_str(word);
    } else {
        out.extend(word.chars().map(|c| if plain(c) { c } else { '_' }));
    }
}

fn show(out: &mut String, text: fmt::Arguments<'_>) {
    // Writing into a string cannot fail, and none of the types written reports errors.
    out.write_fmt(text).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::{ChainName, SetName};

    fn text(matches: Vec<Match>, action: Action) -> String {
        rule_fragment(&Rule::new(matches, action), &Features::default())
    }

    #[test]
    fn every_match_and_action_has_the_text_of_the_dictionary() {
        let set = || SetName::new("cali40s:x").unwrap();
        let chain = || ChainName::new("cali-x").unwrap();
        let states = |negated| Match::ConnTrack { negated, states: vec![ConnState::Related, ConnState::Established] };
        let local = |side, negated, limit_out| Match::LocalAddress { side, negated, limit_out };
        let icmp = |family, negated, code| Match::Icmp { family, negated, icmp: program::IcmpType { kind: 8, code } };
        let rate = |per| Rate { count: 5, per };
        let range = |first, last| PortRange { first, last };
        let matches = [
            (Match::MarkClear(0x10000), "-m mark --mark 0/0x10000"),
            (Match::MarkAny(0x30000), "-m mark ! --mark 0/0x30000"),
            (Match::MarkIs { value: 0x10, mask: 0x30 }, "-m mark --mark 0x10/0x30"),
            (Match::MarkIsNot { value: 0x10, mask: 0x30 }, "-m mark ! --mark 0x10/0x30"),
            (Match::In(InterfaceMatch::Exact("eth0".into())), "--in-interface eth0"),
            (Match::Out(InterfaceMatch::Prefix("cali".into())), "--out-interface cali+"),
            (Match::In(InterfaceMatch::Prefix("abcdefghijklmn".into())), "--in-interface abcdefghijklmn+"),
            (Match::In(InterfaceMatch::Prefix("abcdefghijklmno".into())), "--in-interface abcdefghijklmno"),
            (Match::ReversePathFailed, "-m rpfilter --invert --validmark"),
            (local(Side::Source, false, false), "-m addrtype --src-type LOCAL"),
            (local(Side::Source, true, true), "-m addrtype ! --src-type LOCAL --limit-iface-out"),
            (local(Side::Destination, true, false), "-m addrtype ! --dst-type LOCAL"),
            (states(false), "-m conntrack --ctstate RELATED,ESTABLISHED"),
            (states(true), "-m conntrack ! --ctstate RELATED,ESTABLISHED"),
            (Match::Protocol { negated: true, protocol: program::Protocol::Number(6) }, "! -p 6"),
            (Match::Protocol { negated: false, protocol: program::Protocol::Name("tcp".into()) }, "-p tcp"),
            (
                Match::Net { side: Side::Source, negated: true, net: "10.0.0.0/8".parse().unwrap() },
                "! --source 10.0.0.0/8",
            ),
            (Match::Address { side: Side::Destination, address: "fd00::1".parse().unwrap() }, "--destination fd00::1"),
            (
                Match::Set { side: Side::Source, negated: true, set: set(), with_port: true },
                "-m set ! --match-set cali40s:x src,src",
            ),
            (
                Match::Set { side: Side::Destination, negated: false, set: set(), with_port: false },
                "-m set --match-set cali40s:x dst",
            ),
            (
                Match::Ports { side: Side::Destination, negated: true, ports: vec![range(80, 80), range(1, 9)] },
                "-m multiport ! --destination-ports 80,1:9",
            ),
            (Match::DestinationPort(4789), "--dport 4789"),
            (icmp(Family::V4, false, None), "-m icmp --icmp-type 8"),
            (icmp(Family::V6, true, Some(0)), "-m icmp6 ! --icmpv6-type 8/0"),
            (Match::Limit { rate: rate(RateUnit::Minute), burst: 7 }, "-m limit --limit 5/minute --limit-burst 7"),
            (Match::Limit { rate: rate(RateUnit::Second), burst: 0 }, "-m limit --limit 5/second"),
        ];
        for (condition, expected) in matches {
            assert_eq!(text(vec![condition], Action::Accept), format!("{expected} --jump ACCEPT"));
        }
        let v6 = || "fd00::1".parse().unwrap();
        let actions = [
            (Action::Goto(chain()), "--goto cali-x"),
            (Action::Jump(chain()), "--jump cali-x"),
            (Action::SetMark(1), "--jump MARK --set-mark 0x1/0x1"),
            (Action::ClearMark(1), "--jump MARK --set-mark 0/0x1"),
            (Action::SetMaskedMark { value: 0, mask: 3 }, "--jump MARK --set-mark 0x0/0x3"),
            (Action::NoTrack, "--jump NOTRACK"),
            (Action::Log { prefix: "a b".into() }, "--jump LOG --log-prefix \"a b: \" --log-level 5"),
            (
                Action::NfLog { group: 1, prefix: "DRI".into() },
                "--jump NFLOG --nflog-group 1 --nflog-prefix DRI --nflog-size 80",
            ),
            (
                Action::MarkWithinRate { rate: rate(RateUnit::Sec), burst: 9, mark: 1 },
                "-m limit --limit 5/sec --limit-burst 9 --jump MARK --set-mark 0x1/0x1",
            ),
            (Action::Dnat { to: v6(), port: None }, "--jump DNAT --to-destination fd00::1"),
            (Action::Dnat { to: v6(), port: Some(80) }, "--jump DNAT --to-destination [fd00::1]:80"),
            (
                Action::Snat { to: "10.0.0.1".parse().unwrap(), ports: Some(range(1, 2)) },
                "--jump SNAT --to-source 10.0.0.1:1-2 --random-fully",
            ),
            (Action::Masquerade { ports: Some(range(1, 2)) }, "--jump MASQUERADE --to-ports 1-2 --random-fully"),
            (Action::Dscp(10), "--jump DSCP --set-dscp 10"),
        ];
        for (action, expected) in actions {
            assert_eq!(text(Vec::new(), action), expected);
        }
    }

    #[test]
    fn old_kernels_and_tools_get_the_older_options() {
        let old = Features {
            snat_random_fully: false,
            masquerade_random_fully: false,
            nflog_size: false,
            ..Features::default()
        };
        let fragment = |action| rule_fragment(&Rule::new(Vec::new(), action), &old);
        assert_eq!(fragment(Action::Masquerade { ports: None }), "--jump MASQUERADE");
        assert_eq!(
            fragment(Action::Snat { to: "10.0.0.1".parse().unwrap(), ports: None }),
            "--jump SNAT --to-source 10.0.0.1"
        );
        assert_eq!(
            fragment(Action::NfLog { group: 2, prefix: "DRE".into() }),
            "--jump NFLOG --nflog-group 2 --nflog-prefix DRE --nflog-range 80"
        );
    }

    #[test]
    fn no_text_leaves_its_place_in_the_line() {
        let nasty = "a\" -j ACCEPT\n-A INPUT\\é'";
        let rule = Rule::new(
            vec![
                Match::In(InterfaceMatch::Exact(nasty.into())),
                Match::Protocol { negated: false, protocol: program::Protocol::Name(nasty.into()) },
            ],
            Action::NfLog { group: 1, prefix: nasty.into() },
        )
        .comment(nasty);
        let line = rule_fragment(&rule, &Features::default());
        let word = "a__-j_ACCEPT_-A_INPUT___";
        assert_eq!(
            line,
            format!(
                "-m comment --comment \"a_ -j ACCEPT_-A INPUT___\" --in-interface {word} -p {word} \
                 --jump NFLOG --nflog-group 1 --nflog-prefix {word} --nflog-size 80"
            )
        );
        let log = rule_fragment(&Rule::new(Vec::new(), Action::Log { prefix: nasty.into() }), &Features::default());
        assert_eq!(log, "--jump LOG --log-prefix \"a_ -j ACCEPT_-A INPUT__': \" --log-level 5");
    }

    #[test]
    fn no_rule_is_longer_than_the_tools_read() {
        let line = |rule: &Rule| rule_line(&format!("-A {}", "c".repeat(28)), rule, hash(), &Features::default());
        let rule = |comments: Vec<String>| Rule { comments, ..Rule::new(Vec::new(), Action::Drop) };
        // (comments, those that are written)
        for (comment, n, written) in [
            ("k=v".to_owned(), 1, 1),
            ("k=v".to_owned(), 58, 58),
            ("k=v".to_owned(), 10_000, 59),
            (" ".repeat(256), 30, 30),
            ("-A INPUT -j ACCEPT ".repeat(100), 10_000, 35),
        ] {
            let line = line(&rule(vec![comment.clone(); n]));
            assert!(line.len() < 10_200, "{} bytes", line.len());
            assert_eq!(line.matches("--comment").count(), written + 1, "{n} of {comment:?}");
            assert!(line.ends_with(" --jump DROP"), "{line}");
        }
        let log = Rule::new(Vec::new(), Action::Log { prefix: "-A INPUT ".repeat(10_000) });
        assert!(line(&log).len() < 1_200);
    }

    #[test]
    fn a_rule_that_is_too_long_without_comments_drops() {
        let ports = || Match::Ports { side: Side::Source, negated: true, ports: vec![PortRange::single(1)] };
        let set = || Match::Set {
            side: Side::Source,
            negated: true,
            set: SetName::new(&"x".repeat(31)).unwrap(),
            with_port: true,
        };
        let rule = |matches: Vec<Match>| Rule::new(matches, Action::Accept).comment("k=v");
        for matches in [vec![ports(); 60], vec![set(); 200], vec![ports(); 10_000]] {
            let text = rule_fragment(&rule(matches), &Features::default());
            assert_eq!(text, "-m comment --comment \"Too long to be written\" --jump DROP");
        }
        assert!(rule_fragment(&rule(vec![ports(); 40]), &Features::default()).ends_with("--jump ACCEPT"));
    }

    fn hash() -> RuleHash {
        RuleHash::parse("hecdSCslEjdBPBPo").unwrap()
    }

    #[test]
    fn a_comment_is_cut_at_256_bytes_after_replacing() {
        let rule = Rule { comments: vec!["é".repeat(300)], ..Rule::default() };
        assert_eq!(rule_fragment(&rule, &Features::default()), format!("-m comment --comment \"{}\"", "_".repeat(256)));
    }
}
