//! Lets host programs reach one address within the closed network namespace, and nothing else.
//!
//! A socket belongs to the namespace in which it was made. The harness makes the listening socket in the machine's own network and gives it
//! as standard input to this process, which runs inside the closed one: it accepts on one side and connects on the other.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

/// Connections at one time; more are refused, since each costs two threads.
const LIMIT: usize = 256;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Accepts on standard input and connects each to `target` (`address:port`), for ever.
///
/// # Errors
/// Standard input is no listening socket.
pub fn run(target: &str) -> Result<()> {
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener
        .local_addr()
        .context("standard input must be a listening socket; `up` starts this command itself")?;
    for outside in listener.incoming() {
        let Ok(outside) = outside else { continue };
        if OPEN.fetch_add(1, Ordering::Relaxed) >= LIMIT {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let target = target.to_owned();
        std::thread::spawn(move || {
            // A broken connection is the business of its two ends, which both see it closed.
            let _ = join(&outside, &target);
            OPEN.fetch_sub(1, Ordering::Relaxed);
        });
    }
    Ok(())
}

fn join(outside: &TcpStream, target: &str) -> io::Result<()> {
    let inside = TcpStream::connect(target)?;
    for stream in [outside, &inside] {
        stream.set_nodelay(true)?;
    }
    std::thread::scope(|scope| {
        scope.spawn(|| pump(outside, &inside));
        pump(&inside, outside);
    });
    Ok(())
}

fn pump(mut from: &TcpStream, mut to: &TcpStream) {
    // On an error both directions end; at the end of the input only this one does.
    match io::copy(&mut from, &mut to) {
        Ok(_) => drop(to.shutdown(Shutdown::Write)),
        Err(_) => {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    }
}
