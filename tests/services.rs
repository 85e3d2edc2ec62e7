//! Who answers: TCP and UDP echo services in the namespaces of the bed.
//!
//! A socket stays in the namespace in which it was opened, so one thread serves all of them.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

/// Sockets that are open and not yet served.
#[derive(Debug, Default)]
pub struct Sockets {
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
}

impl Sockets {
    /// Opens listeners in the calling thread's namespace; the TCP ports in both families on all addresses.
    ///
    /// # Errors
    ///
    /// If one is taken.
    pub fn open(&mut self, tcp: &[u16], udp: &[SocketAddr]) -> Result<()> {
        for port in tcp {
            let listener = TcpListener::bind(("::", *port)).with_context(|| format!("tcp {port}"))?;
            listener.set_nonblocking(true)?;
            self.tcp.push(listener);
        }
        for address in udp {
            let socket = UdpSocket::bind(address).with_context(|| format!("udp {address}"))?;
            socket.set_nonblocking(true)?;
            self.udp.push(socket);
        }
        Ok(())
    }

    /// Starts to answer.
    ///
    /// # Errors
    ///
    /// If no thread or event loop can be made.
    pub fn serve(self) -> Result<Services> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        {
            let _entered = runtime.enter();
            for listener in self.tcp {
                runtime.spawn(accept(tokio::net::TcpListener::from_std(listener)?));
            }
            for socket in self.udp {
                runtime.spawn(echo_datagrams(tokio::net::UdpSocket::from_std(socket)?));
            }
        }
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("services".to_owned()).spawn(move || {
            // Either way it is time to end.
            drop(runtime.block_on(stopped));
        })?;
        Ok(Services { stop: Some(stop), thread: Some(thread) })
    }
}

/// Services that answer until this is dropped.
#[derive(Debug)]
pub struct Services {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Services {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed; there is nothing to add while cleaning up.
            drop(thread.join());
        }
    }
}

async fn accept(listener: tokio::net::TcpListener) {
    // An error of accept() is that of one connection that has gone.
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo_stream(stream));
        }
    }
}

async fn echo_stream(mut stream: tokio::net::TcpStream) {
    let mut buffer = [0; 2048];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

async fn echo_datagrams(socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            // The asker may have gone; there is always the next one.
            drop(socket.send_to(&buffer[..length], from).await);
        }
    }
}
