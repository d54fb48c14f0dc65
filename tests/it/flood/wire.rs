//! HTTP/2 by hand, so that it can be wrong.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RESET: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GO_AWAY: u8 = 7;
pub(super) const WINDOW: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A text with its length before it, as HPACK writes it plainly.
fn text(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    match u8::try_from(text.len()) {
        Ok(length) if length < 127 => bytes.push(length),
        _ => {
            let mut rest = text.len() - 127;
            bytes.push(127);
            while rest > 127 {
                bytes.push(u8::try_from(rest % 128).unwrap() | 128);
                rest /= 128;
            }
            bytes.push(u8::try_from(rest).unwrap());
        }
    }
    bytes.extend(text);
    bytes
}

/// One field of a header block.
pub(super) fn field(name: &str, value: &[u8]) -> Vec<u8> {
    [vec![0], text(name.as_bytes()), text(value)].concat()
}

/// The header block of a call.
pub(super) fn block(method: &str, more: &[(&str, &[u8])]) -> Vec<u8> {
    let path = format!("/SpiffeWorkloadAPI/{method}");
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "localhost"),
        (":path", &path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("workload.spiffe.io", "true"),
    ] {
        block.extend(field(name, value.as_bytes()));
    }
    for (name, value) in more {
        block.extend(field(name, value));
    }
    block
}

/// A whole call with one message.
pub(super) fn call(stream: u32, method: &str, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0][..], &length, message].concat();
    let mut bytes = frame(HEADERS, END_HEADERS, stream, &block(method, &[]));
    let mut parts = body.chunks(16_384).peekable();
    while let Some(part) = parts.next() {
        let end = if parts.peek().is_none() {
            END_STREAM
        } else {
            0
        };
        bytes.extend(frame(DATA, end, stream, part));
    }
    bytes
}

/// The beginning of a connection.
pub(super) fn greeting() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

/// How a connection ended.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// By the server.
    Closed,
    /// Not at all: the server waits.
    Open,
}

/// A connection that writes what it likes.
pub(super) struct Raw(UnixStream);

impl Raw {
    pub(super) fn connect(socket: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        stream.set_write_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self(stream))
    }

    /// Writes; `false` if the server does not take it.
    pub(super) fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).is_ok()
    }

    /// Reads what comes, until the server closes or is silent.
    pub(super) fn read(&mut self) -> (Vec<u8>, End) {
        let mut heard = Vec::new();
        let mut buffer = vec![0; 65_536];
        loop {
            match self.0.read(&mut buffer) {
                Ok(0) => return (heard, End::Closed),
                Ok(count) => heard.extend(&buffer[..count]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return (heard, End::Open);
                }
                Err(_) => return (heard, End::Closed),
            }
        }
    }
}

/// The kinds of the frames in what was heard.
pub(super) fn kinds(mut heard: &[u8]) -> Vec<u8> {
    let mut kinds = Vec::new();
    while let [high, middle, low, kind, ..] = *heard {
        kinds.push(kind);
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        heard = heard.get(9 + length..).unwrap_or_default();
    }
    kinds
}
