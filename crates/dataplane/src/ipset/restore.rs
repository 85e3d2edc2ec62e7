//! Sets through the `ipset` program: the way for kernels whose netlink protocol is unknown.
//!
//! Used by [`Automatic`](super::transport::Automatic). One `ipset restore` performs a whole series of
//! operations; the line number in its complaint says which one failed (netfilter.md 17.3, 17.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use model::Family;
use program::{Member, SetName};

use super::transport::{Contents, Failure, Listing, Op, Series, SetError, Transport};
use super::wire;

const PROGRAM: &str = "ipset";
/// How often the end of a run is looked for; only the fall-back path pays it.
const POLL: Duration = Duration::from_millis(1);

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Restore {
    timeout: Duration,
}

impl Restore {
    /// `timeout` limits each run of the program.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout }
    }

    fn run(&self, arguments: &[&str], input: String) -> Result<Output, SetError> {
        let mut child = Command::new(PROGRAM)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| SetError::Lost(format!("`{PROGRAM}` could not be started: {error}")))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // Each pipe has its own thread, so that none can fill up while another is waited for.
        let (stdout, stderr, status) = thread::scope(|scope| {
            scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
            let stdout = scope.spawn(move || read_to_end(stdout));
            let stderr = scope.spawn(move || read_to_end(stderr));
            let status = wait(&mut child, self.timeout);
            (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default(), status)
        });
        match status {
            Some(code) => Ok(Output { code, stdout, stderr }),
            None => Err(SetError::Lost(format!("`{PROGRAM}` did not finish within {:?}", self.timeout))),
        }
    }
}

/// What a run left behind. `code` is negative if a signal ended it.
#[derive(Debug)]
struct Output {
    code: i32,
    stdout: String,
    stderr: String,
}

fn read_to_end(pipe: Option<impl std::io::Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut bytes).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for the end of the program; ends it and returns `None` after `timeout`.
fn wait(child: &mut Child, timeout: Duration) -> Option<i32> {
    let deadline = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.code().unwrap_or(-1)),
            Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
            Ok(None) | Err(_) => {
                child.kill().ok();
                child.wait().ok();
                return None;
            }
        }
    }
}

impl Transport for Restore {
    fn list(&mut self) -> Result<Listing, SetError> {
        let output = self.run(&["list", "-name"], String::new())?;
        if output.code != 0 {
            return Err(error_of(&output.stderr));
        }
        Ok(Listing { names: output.stdout.lines().map(str::to_owned).collect(), complete: true })
    }

    fn read(&mut self, set: &SetName) -> Result<Option<Contents>, SetError> {
        let output = self.run(&["save", set.as_str()], String::new())?;
        if output.code != 0 {
            let error = error_of(&output.stderr);
            return if error == SetError::Missing { Ok(None) } else { Err(error) };
        }
        parse_save(&output.stdout).map(Some)
    }

    fn perform(&mut self, ops: &[Op]) -> Result<(), Failure> {
        self.run_script(&ops.iter().collect::<Vec<_>>())
    }

    /// Starts one program for all of them; another for those behind a failure.
    fn perform_each(&mut self, series: &[Series]) -> BTreeMap<usize, Failure> {
        let mut failures = BTreeMap::new();
        let mut start = 0;
        while let Some(rest) = series.get(start..).filter(|rest| !rest.is_empty()) {
            let ops: Vec<&Op> = rest.iter().flat_map(|series| &series.ops).collect();
            let Err(Failure { mut op, done, error }) = self.run_script(&ops) else { break };
            let mut failed = start;
            for series in rest {
                if op < series.ops.len() {
                    break;
                }
                op -= series.ops.len();
                failed += 1;
            }
            if matches!(error, SetError::Lost(_)) {
                let lost = |index| (index, Failure { op: 0, done: 0, error: error.clone() });
                failures.extend((start..series.len()).map(lost));
                break;
            }
            failures.insert(failed, Failure { op, done, error });
            start = failed + 1;
        }
        failures
    }
}

impl Restore {
    fn run_script(&self, ops: &[&Op]) -> Result<(), Failure> {
        let script = Script::new(ops);
        if script.places.is_empty() {
            return Ok(());
        }
        let output = self.run(&["restore"], script.text).map_err(|error| Failure { op: 0, done: 0, error })?;
        if output.code == 0 {
            return Ok(());
        }
        let error = error_of(&output.stderr);
        let place = failed_line(&output.stderr).and_then(|line| script.places.get(line.checked_sub(1)?));
        let Some(&(op, done)) = place else {
            // How far it got is unknown.
            return Err(Failure { op: 0, done: 0, error: SetError::Lost(output.stderr.trim().to_owned()) });
        };
        match (ops.get(op), error) {
            (Some(Op::Destroy { .. }), SetError::Missing) => {
                match self.run_script(ops.get(op + 1..).unwrap_or_default()) {
                    Ok(()) => Ok(()),
                    Err(failure) => Err(Failure { op: failure.op + op + 1, ..failure }),
                }
            }
            (Some(Op::Add { .. } | Op::Remove { .. }), SetError::Other(text)) => {
                Err(Failure { op, done, error: SetError::Member(text) })
            }
            (_, error) => Err(Failure { op, done, error }),
        }
    }
}

/// Input of `ipset restore`, and which operation and member each line is about.
#[derive(Debug, Default)]
struct Script {
    text: String,
    places: Vec<(usize, usize)>,
}

impl Script {
    fn new(ops: &[&Op]) -> Self {
        let mut script = Self::default();
        for (index, op) in ops.iter().enumerate() {
            match op {
                Op::Create { name, kind, family, max_members, hash_size } => {
                    let family = match family {
                        Family::V4 => "inet",
                        Family::V6 => "inet6",
                    };
                    let kind = wire::type_name(*kind);
                    script.line(
                        (index, 0),
                        format_args!("create {name} {kind} family {family} hashsize {hash_size} maxelem {max_members}"),
                    );
                }
                Op::Add { set, members } => {
                    for (done, member) in members.iter().enumerate() {
                        script.line((index, done), format_args!("add {set} {} -exist", Text(&member)));
                    }
                }
                Op::Remove { set, members } => {
                    for (done, member) in members.iter().enumerate() {
                        script.line((index, done), format_args!("del {set} {} -exist", Text(&member)));
                    }
                }
                Op::Swap { set, with } => script.line((index, 0), format_args!("swap {set} {with}")),
                Op::Destroy { set } => script.line((index, 0), format_args!("destroy {set}")),
            }
        }
        script.text.push_str("COMMIT\n");
        script
    }

    fn line(&mut self, place: (usize, usize), text: std::fmt::Arguments<'_>) {
        self.places.push(place);
        // Writing to a string does not fail.
        writeln!(self.text, "{text}").ok();
    }
}

/// A member as `ipset` writes it (netfilter.md 17.1).
struct Text<'a>(&'a Member);

impl std::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Member::Address(address) => write!(f, "{address}"),
            Member::Net(net) => write!(f, "{net}"),
            Member::AddressPort { address, protocol, port } => match protocol {
                6 => write!(f, "{address},tcp:{port}"),
                17 => write!(f, "{address},udp:{port}"),
                132 => write!(f, "{address},sctp:{port}"),
                136 => write!(f, "{address},udplite:{port}"),
                other => write!(f, "{address},{other}:{port}"),
            },
        }
    }
}

/// Reads the output of `ipset save NAME`.
fn parse_save(text: &str) -> Result<Contents, SetError> {
    let mut contents = Contents { complete: true, ..Contents::default() };
    let mut created = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("create") => {
                created = true;
                words.next();
                contents.type_name = words.next().unwrap_or_default().to_owned();
                while let Some(word) = words.next() {
                    match word {
                        "family" => {
                            contents.family = match words.next() {
                                Some("inet") => Some(Family::V4),
                                Some("inet6") => Some(Family::V6),
                                _ => None,
                            }
                        }
                        "maxelem" => contents.max_members = words.next().and_then(|number| number.parse().ok()),
                        "timeout" | "netmask" | "bitmask" | "forceadd" => contents.odd = true,
                        _ => (),
                    }
                }
            }
            Some("add") => {
                words.next();
                let member = words.next().and_then(|word| parse_member(&contents.type_name, word));
                match member.filter(|_| !words.any(|word| matches!(word, "nomatch" | "timeout"))) {
                    Some(member) => contents.members.push(member),
                    None => contents.odd = true,
                }
            }
            _ => (),
        }
    }
    if created { Ok(contents) } else { Err(SetError::Other(format!("`{PROGRAM} save` printed no set"))) }
}

fn parse_member(type_name: &str, text: &str) -> Option<Member> {
    match type_name {
        "hash:ip" => text.parse().ok().map(Member::Address),
        "hash:net" => text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok().map(Member::Net),
        "hash:ip,port" => {
            let (address, port) = text.split_once(',')?;
            let (protocol, port) = port.split_once(':')?;
            let protocol = match protocol {
                "tcp" => 6,
                "udp" => 17,
                "sctp" => 132,
                "udplite" => 136,
                number => number.parse().ok()?,
            };
            Some(Member::AddressPort { address: address.parse().ok()?, protocol, port: port.parse().ok()? })
        }
        _ => None,
    }
}

/// Returns the line number in `ipset v7.17: Error in line 3: …`.
fn failed_line(stderr: &str) -> Option<usize> {
    let (_, rest) = stderr.split_once("Error in line ")?;
    rest.split_once(':')?.0.trim().parse().ok()
}

fn error_of(stderr: &str) -> SetError {
    const TEXTS: [(&str, SetError); 6] = [
        ("is full, cannot add more elements", SetError::Full),
        ("in use by a kernel component", SetError::Busy),
        ("set with the same name already exists", SetError::Exists),
        ("name does not exist", SetError::Missing),
        ("type does not match", SetError::TypesDiffer),
        ("unknown settype", SetError::TypeUnknown),
    ];
    let known = TEXTS.iter().find(|(text, _)| stderr.contains(text)).map(|(_, error)| error.clone());
    known.unwrap_or_else(|| SetError::Other(stderr.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::SetKind;

    fn name(text: &str) -> SetName {
        SetName::new(text).unwrap()
    }

    #[test]
    fn a_script_knows_what_each_line_is_about() {
        let ops = [
            Op::Create {
                name: name("cali40a"),
                kind: SetKind::AddressPort,
                family: Family::V4,
                max_members: 100,
                hash_size: 1024,
            },
            Op::Add {
                set: name("cali40a"),
                members: [
                    Member::AddressPort { address: "10.0.0.1".parse().unwrap(), protocol: 6, port: 80 },
                    Member::AddressPort { address: "10.0.0.2".parse().unwrap(), protocol: 132, port: 1 },
                ]
                .into(),
            },
            Op::Remove { set: name("cali60b"), members: [Member::Net("fd00::/64".parse().unwrap())].into() },
            Op::Swap { set: name("cali40a"), with: name("cali4t0") },
            Op::Destroy { set: name("cali4t0") },
        ];
        let script = Script::new(&ops.iter().collect::<Vec<_>>());
        assert_eq!(
            script.text,
            "create cali40a hash:ip,port family inet hashsize 1024 maxelem 100\n\
             add cali40a 10.0.0.1,tcp:80 -exist\n\
             add cali40a 10.0.0.2,sctp:1 -exist\n\
             del cali60b fd00::/64 -exist\n\
             swap cali40a cali4t0\n\
             destroy cali4t0\n\
             COMMIT\n"
        );
        assert_eq!(script.places, [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]);
    }

    #[test]
    fn saved_sets_are_read_with_all_their_forms() {
        let plain = parse_save(
            "create cali40n hash:net family inet hashsize 1024 maxelem 1048576 bucketsize 12 initval 0x1\n\
             add cali40n 10.0.0.0/8\nadd cali40n 10.1.2.3\n",
        )
        .unwrap();
        assert_eq!((plain.type_name.as_str(), plain.family, plain.odd), ("hash:net", Some(Family::V4), false));
        assert_eq!(plain.max_members, Some(1_048_576));
        let nets = ["10.0.0.0/8", "10.1.2.3/32"].map(|net| Member::Net(net.parse().unwrap()));
        assert_eq!(plain.members, nets);

        let ports =
            parse_save("create p hash:ip,port family inet6 hashsize 64 maxelem 9\nadd p fd00::1,udp:53\n").unwrap();
        let port = Member::AddressPort { address: "fd00::1".parse().unwrap(), protocol: 17, port: 53 };
        assert_eq!((ports.family, ports.members.as_slice()), (Some(Family::V6), [port].as_slice()));

        for odd in [
            "create t hash:ip family inet hashsize 64 maxelem 9 timeout 300\n",
            "create t hash:net family inet hashsize 64 maxelem 9\nadd t 10.0.0.0/8 nomatch\n",
            "create t hash:ip,port family inet hashsize 64 maxelem 9\nadd t 10.0.0.1,icmp:echo-request\n",
        ] {
            assert!(parse_save(odd).unwrap().odd, "{odd}");
        }
        assert!(parse_save("").is_err());
    }

    #[test]
    fn complaints_are_told_apart() {
        let cases = [
            ("ipset v7.17: Error in line 3: Hash is full, cannot add more elements", Some(3), SetError::Full),
            (
                "ipset v7.17: Error in line 1: Set cannot be destroyed: it is in use by a kernel component",
                Some(1),
                SetError::Busy,
            ),
            (
                "ipset v7.17: Error in line 12: Set cannot be created: set with the same name already exists",
                Some(12),
                SetError::Exists,
            ),
            ("ipset v6.29: The set with the given name does not exist", None, SetError::Missing),
            (
                "ipset v7.17: Error in line 1: The sets cannot be swapped: their type does not match",
                Some(1),
                SetError::TypesDiffer,
            ),
        ];
        for (text, line, error) in cases {
            assert_eq!((failed_line(text), error_of(text)), (line, error), "{text}");
        }
    }
}
