//! Speaks for others: whoever connects to LISTEN is connected to TARGET, where this process is the
//! one that called. A static program, to be the only file of a container.
//!
//! usage: bridge LISTEN TARGET

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(target)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other("usage: bridge LISTEN TARGET"));
    };
    // Outlives no test, whatever happens to that.
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(300));
        std::process::exit(0);
    });
    let listener = UnixListener::bind(listen)?;
    for near in listener.incoming() {
        let near = near?;
        let Ok(far) = UnixStream::connect(&target) else {
            continue;
        };
        let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
        std::thread::spawn(move || pump(near, far));
        std::thread::spawn(move || pump(far_too, near_too));
    }
    Ok(())
}

fn pump(mut from: UnixStream, mut to: UnixStream) {
    let _ended = io::copy(&mut from, &mut to);
    let _gone = to.shutdown(Shutdown::Both);
    let _gone = from.shutdown(Shutdown::Both);
}
