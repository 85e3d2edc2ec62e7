//! Guests of the host: namespaces with interfaces in them, and datagrams between them.
//!
//! A guest is set up as a cloud's guest is: an address and a default route, nothing else. That a datagram arrives says
//! that chains, dispatch and route of both ends are in force, whatever the variant.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::netns::Netns;

use crate::world::{LIMIT, mac, run};

/// A namespace with one interface, whose other end is `tap-<name>` in the namespace of the caller.
pub(crate) fn guest(name: &str, address: Ipv4Addr) -> Result<Netns> {
    let netns = Netns::new(name)?;
    let status = Command::new("ip")
        .args(["link", "add", &format!("tap-{name}"), "up", "type", "veth"])
        .args(["peer", "name", "eth0", "address", &mac(address), "netns", netns.name()])
        .status()?;
    ensure!(status.success(), "cannot make the interface of workload {name}");
    netns.sh(&format!("ip link set eth0 up; ip addr add {address}/16 dev eth0; ip route add default via 10.65.0.1"))?;
    netns.await_up("eth0")?;
    Ok(netns)
}

/// One namespace that plays many guests: an interface for each, with its address.
pub(crate) fn crowd(label: &str, guests: &[(String, Ipv4Addr)]) -> Result<Netns> {
    let netns = Netns::new(label)?;
    let (mut outside, mut inside) = (String::new(), String::new());
    for (index, (name, address)) in guests.iter().enumerate() {
        outside += &format!(
            "link add tap-{name} up type veth peer name e{index} address {} netns {}\n",
            mac(*address),
            netns.name()
        );
        inside += &format!("link set e{index} up\naddr add {address}/32 dev e{index}\n");
    }
    run("ip", &["-batch", "-"], outside.as_bytes())?;
    netns.enter(|| run("ip", &["-batch", "-"], inside.as_bytes()))?;
    if let Some(last) = guests.len().checked_sub(1) {
        netns.await_up(&format!("e{last}"))?;
    }
    Ok(netns)
}

/// Sends to whatever port is wanted, about ten times a millisecond; 0 is none.
pub(crate) fn send(receiver: Ipv4Addr, port: &AtomicU16, stop: &AtomicBool) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    while !stop.load(Ordering::Relaxed) {
        let port = port.load(Ordering::Relaxed);
        if port != 0 {
            // Refused while nobody listens, unreachable until the agent has set the host up: both are fine.
            drop(socket.send_to(b"x", SocketAddr::from((receiver, port))));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Tells when it listens and when the first datagram has come.
pub(crate) fn listen(port: u16, ready: &mpsc::Sender<()>, seen: &mpsc::Sender<Instant>) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    socket.set_read_timeout(Some(LIMIT))?;
    ready.send(())?;
    socket.recv_from(&mut [0; 16])?;
    seen.send(Instant::now())?;
    Ok(())
}
