//! A byte stream carried in the binary frames of a WebSocket (RFC 6455), for either end.
//!
//! Proxies upgrade a connection to one where a load balancer in front of them understands HTTP but
//! not ALPN. Pings are answered; a close frame is the end of the stream. Where the stream lies in
//! messages means nothing, so fragments are taken as they come.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::crypto::sha1;

/// What a server adds to the client's key before it hashes it (section 1.3).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The most that one frame of ours carries.
const MAX_FRAME: usize = 32 * 1024;
/// The most that a control frame may carry (section 5.5).
const MAX_CONTROL: usize = 125;
/// Unsent answers to pings at which the peer counts as broken: it sends and does not read.
const MAX_UNSENT: usize = 256 * 1024;

/// What stands for a length that takes two octets, and for one that takes eight.
const TWO: u8 = 0x7e;
const EIGHT: u8 = 0x7f;
/// The bit that says that a frame is masked.
const MASKED: u8 = 0x80;

/// Opcodes (section 5.2).
const CONTINUATION: u8 = 0;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// `Sec-WebSocket-Accept` for a client's `Sec-WebSocket-Key`.
#[must_use]
pub fn accept(key: &str) -> String {
    STANDARD.encode(sha1(format!("{key}{GUID}").as_bytes()))
}

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its frames are masked. The mask is all zeros: it protects caches from scripts in browsers,
    /// there are none here, and Teleport's older servers do not take a mask off.
    Client,
    /// Its frames are not masked.
    Server,
}

/// The stream. One task should read and write it: answers to pings are sent while reading.
pub struct WebSocket<S> {
    io: S,
    end: End,
    reading: Reading,
    out: BytesMut,
    closing: bool,
    pings: Option<Interval>,
}

impl<S> fmt::Debug for WebSocket<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocket")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Reading {
    /// The head of a frame, as far as it has come.
    Head(Vec<u8>),
    Data {
        left: u64,
        mask: Mask,
    },
    Control {
        opcode: u8,
        left: u64,
        mask: Mask,
        payload: Vec<u8>,
    },
    End,
}

/// A mask and the place in it.
#[derive(Debug, Clone, Copy)]
struct Mask {
    key: [u8; 4],
    at: usize,
}

impl Mask {
    fn apply(&mut self, bytes: &mut [u8]) {
        if self.key == [0; 4] {
            return;
        }
        for (byte, mask) in bytes.iter_mut().zip(self.key.iter().cycle().skip(self.at)) {
            *byte ^= mask;
        }
        self.at = (self.at + bytes.len()) % 4;
    }
}

/// The parts of a frame's head that count.
struct Head {
    last: bool,
    opcode: u8,
    length: u64,
    mask: Mask,
}

/// How long the head is that begins with `bytes`; two bytes are needed to know.
fn head_length(bytes: &[u8]) -> usize {
    let Some(second) = bytes.get(1) else {
        return 2;
    };
    let length = match second & 0x7f {
        TWO => 2,
        EIGHT => 8,
        _ => 0,
    };
    let mask = if second & MASKED == 0 { 0 } else { 4 };
    2 + length + mask
}

/// Reads a complete head.
fn head(bytes: &[u8]) -> Option<Head> {
    let mut rest = bytes;
    let (first, second) = (rest.try_get_u8().ok()?, rest.try_get_u8().ok()?);
    if first & 0x70 != 0 {
        return None;
    }
    let length = match second & 0x7f {
        TWO => u64::from(rest.try_get_u16().ok()?),
        EIGHT => rest.try_get_u64().ok().filter(|length| length >> 63 == 0)?,
        short => u64::from(short),
    };
    let key = match second & MASKED {
        0 => [0; 4],
        _ => rest.try_get_u32().ok()?.to_be_bytes(),
    };
    Some(Head {
        last: first & 0x80 != 0,
        opcode: first & 0x0f,
        length,
        mask: Mask { key, at: 0 },
    })
}

fn broken(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("WebSocket: {problem}"))
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// A stream over `io`, from right behind the handshake on.
    pub fn new(io: S, end: End) -> Self {
        Self {
            io,
            end,
            reading: Reading::Head(Vec::new()),
            out: BytesMut::new(),
            closing: false,
            pings: None,
        }
    }

    /// Sends a ping after each `period`, so that nobody on the way takes the connection for idle.
    #[must_use]
    pub fn with_pings(mut self, period: Duration) -> Self {
        let mut pings = interval_at(Instant::now() + period, period);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.pings = Some(pings);
        self
    }

    /// Queues the pings that are due.
    fn keep_alive(&mut self, cx: &mut Context<'_>) {
        let Some(pings) = &mut self.pings else {
            return;
        };
        let mut due = false;
        while pings.poll_tick(cx).is_ready() {
            due = true;
        }
        if due && self.out.is_empty() && !self.closing {
            self.frame(PING, b"tbot");
        }
    }

    /// Queues one frame.
    fn frame(&mut self, opcode: u8, payload: &[u8]) {
        let masked = match self.end {
            End::Client => MASKED,
            End::Server => 0,
        };
        self.out.put_u8(0x80 | opcode);
        match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
            (Ok(length @ ..=125), _) => self.out.put_u8(masked | length),
            (_, Ok(length)) => {
                self.out.put_u8(masked | TWO);
                self.out.put_u16(length);
            }
            _ => {
                self.out.put_u8(masked | EIGHT);
                self.out.put_u64(payload.len() as u64);
            }
        }
        if self.end == End::Client {
            self.out.put_u32(0);
        }
        self.out.put_slice(payload);
    }

    /// Sends what is queued.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out.has_remaining() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.out))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.out.advance(sent),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads into `into`, at most `most` bytes; tells how many.
    fn fill(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut [u8],
        most: u64,
    ) -> Poll<io::Result<usize>> {
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(into.len());
        let mut part = ReadBuf::new(into.get_mut(..most).unwrap_or_default());
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        Poll::Ready(Ok(part.filled().len()))
    }

    /// What follows when a frame's head is complete.
    fn begin(&mut self, bytes: &[u8]) -> io::Result<()> {
        let head = head(bytes).ok_or_else(|| broken("a frame of an unknown kind"))?;
        let Head {
            last,
            opcode,
            length: left,
            mask,
        } = head;
        self.reading = match opcode {
            BINARY | CONTINUATION => Reading::Data { left, mask },
            CLOSE | PING | PONG if last && left <= MAX_CONTROL as u64 => Reading::Control {
                opcode,
                left,
                mask,
                payload: Vec::new(),
            },
            _ => return Err(broken("a frame of an unknown kind")),
        };
        Ok(())
    }

    /// What follows when a control frame is complete.
    fn control(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        self.reading = Reading::Head(Vec::new());
        match opcode {
            PING if self.out.len() > MAX_UNSENT => {
                return Err(broken("the peer sends pings and reads nothing"));
            }
            PING => self.frame(PONG, payload),
            CLOSE => {
                self.close(payload);
                self.reading = Reading::End;
            }
            _ => {}
        }
        Ok(())
    }

    fn close(&mut self, payload: &[u8]) {
        if !std::mem::replace(&mut self.closing, true) {
            self.frame(CLOSE, payload);
        }
    }

    /// Takes one step that yields no data, or reads some into `buf`. `true` means that the caller
    /// has something: data, or the end.
    fn step(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        match std::mem::replace(&mut self.reading, Reading::End) {
            Reading::End => Poll::Ready(Ok(true)),
            Reading::Head(mut bytes) => {
                let mut more = [0; 14];
                let missing = head_length(&bytes).saturating_sub(bytes.len()) as u64;
                let filled = self.fill(cx, &mut more, missing);
                if let Poll::Ready(Ok(count)) = &filled {
                    bytes.extend(more.iter().take(*count));
                }
                let whole = bytes.len() == head_length(&bytes);
                let started = !bytes.is_empty();
                self.reading = Reading::Head(bytes.clone());
                match ready!(filled)? {
                    0 if started => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    0 => {
                        self.reading = Reading::End;
                        Poll::Ready(Ok(true))
                    }
                    _ => Poll::Ready(if whole {
                        self.begin(&bytes).map(|()| false)
                    } else {
                        Ok(false)
                    }),
                }
            }
            Reading::Data { left: 0, .. } => {
                self.reading = Reading::Head(Vec::new());
                Poll::Ready(Ok(false))
            }
            Reading::Data { left, mut mask } => {
                self.reading = Reading::Data { left, mask };
                let into = buf.initialize_unfilled();
                let count = ready!(self.fill(cx, into, left))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                mask.apply(into.get_mut(..count).unwrap_or_default());
                buf.advance(count);
                let left = left - count as u64;
                self.reading = Reading::Data { left, mask };
                Poll::Ready(Ok(true))
            }
            Reading::Control {
                opcode,
                left: 0,
                mask: _,
                payload,
            } => Poll::Ready(self.control(opcode, &payload).map(|()| false)),
            Reading::Control {
                opcode,
                left,
                mut mask,
                mut payload,
            } => {
                let mut more = [0; MAX_CONTROL];
                let filled = self.fill(cx, &mut more, left);
                let count = match &filled {
                    Poll::Ready(Ok(count)) => *count,
                    _ => 0,
                };
                let more = more.get_mut(..count).unwrap_or_default();
                mask.apply(more);
                payload.extend_from_slice(more);
                self.reading = Reading::Control {
                    opcode,
                    left: left - count as u64,
                    mask,
                    payload,
                };
                match ready!(filled)? {
                    0 => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    _ => Poll::Ready(Ok(false)),
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            let step = this.step(cx, buf);
            this.keep_alive(cx);
            if this.out.has_remaining()
                && let Poll::Ready(sent) = this.drain(cx)
            {
                sent?;
                if let Poll::Ready(flushed) = Pin::new(&mut this.io).poll_flush(cx) {
                    flushed?;
                }
            }
            if ready!(step)? {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.drain(cx))?;
        let part = data.get(..data.len().min(MAX_FRAME)).unwrap_or_default();
        this.frame(BINARY, part);
        if let Poll::Ready(sent) = this.drain(cx) {
            sent?;
        }
        Poll::Ready(Ok(part.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close(&[]);
        ready!(self.drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    fn client(size: usize) -> (WebSocket<DuplexStream>, DuplexStream) {
        let (ours, theirs) = duplex(size);
        (WebSocket::new(ours, End::Client), theirs)
    }

    #[test]
    fn the_handshake_of_the_standard() {
        // RFC 6455 section 1.3
        assert_eq!(
            accept("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }

    #[tokio::test]
    async fn whatever_is_written_at_one_end_is_read_at_the_other() {
        let (one, other) = duplex(1000);
        let mut client = WebSocket::new(one, End::Client);
        let mut server = WebSocket::new(other, End::Server);
        let sent: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for (from, to) in [
            (0, 1),
            (1, 125),
            (125, 252),
            (252, 66_000),
            (66_000, 400_000),
        ] {
            let part = &sent[from..to];
            let mut read = vec![0; part.len()];
            let write = async {
                client.write_all(part).await.unwrap();
                client.flush().await.unwrap();
            };
            tokio::join!(write, async { server.read_exact(&mut read).await.unwrap() });
            assert_eq!(read, part);
            let write = async {
                server.write_all(part).await.unwrap();
                server.flush().await.unwrap();
            };
            tokio::join!(write, async { client.read_exact(&mut read).await.unwrap() });
            assert_eq!(read, part);
        }
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0, "the end");
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0, "answered");
    }

    #[tokio::test]
    async fn frames_of_others_are_understood_wherever_they_are_cut() {
        // Section 5.7: "Hello" in one masked frame, in two fragments, and a ping between them.
        let frames: &[u8] = &[
            0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58, // masked
            0x02, 0x03, 0x48, 0x65, 0x6c, // first fragment
            0x89, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f, // ping
            0x80, 0x02, 0x6c, 0x6f, // last fragment
            0x88, 0x02, 0x03, 0xe8, // close
        ];
        for piece in [1, 2, 3, 7, frames.len()] {
            let (mut socket, mut peer) = client(1024);
            let feed = async {
                for part in frames.chunks(piece) {
                    peer.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
                let mut answer = vec![0; 11 + 8];
                peer.read_exact(&mut answer).await.unwrap();
                answer
            };
            let mut read = Vec::new();
            let (answer, _) =
                tokio::join!(feed, async { socket.read_to_end(&mut read).await.unwrap() });
            assert_eq!(read, b"HelloHello", "{piece}");
            assert_eq!(answer[..6], [0x8a, 0x85, 0, 0, 0, 0], "a masked pong");
            assert_eq!(&answer[6..11], b"Hello");
            assert_eq!(answer[11..], [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_stream_pings() {
        let (one, mut peer) = duplex(1000);
        let minute = Duration::from_mins(1);
        let mut server = WebSocket::new(one, End::Server).with_pings(minute);
        let mut bytes = [0; 8];
        let pings = async {
            for _ in 0..3 {
                let mut frame = [0; 6];
                peer.read_exact(&mut frame).await.unwrap();
                assert_eq!(&frame, b"\x89\x04tbot");
            }
        };
        let began = Instant::now();
        tokio::select! {
            read = server.read(&mut bytes) => panic!("{read:?}"),
            () = pings => assert_eq!(began.elapsed(), 3 * minute),
        }
    }

    #[tokio::test]
    async fn broken_frames_are_errors() {
        for (what, frames) in [
            ("reserved bits", &[0xf2, 0x00][..]),
            ("text", &[0x81, 0x01, 0x41]),
            ("an unknown opcode", &[0x83, 0x00]),
            ("a ping in fragments", &[0x09, 0x00]),
            ("a long ping", &[0x89, 0x7e, 0x00, 0x7e]),
            (
                "a length beyond all",
                &[0x82, 0x7f, 0xff, 0, 0, 0, 0, 0, 0, 0],
            ),
            ("cut in the head", &[0x82]),
            ("cut in the payload", &[0x82, 0x05, 0x41]),
            ("cut in a ping", &[0x89, 0x05, 0x41]),
        ] {
            let (mut socket, mut peer) = client(1024);
            peer.write_all(frames).await.unwrap();
            drop(peer);
            let mut read = Vec::new();
            assert!(socket.read_to_end(&mut read).await.is_err(), "{what}");
        }
        let (mut socket, peer) = client(1024);
        drop(peer);
        assert_eq!(socket.read(&mut [0; 8]).await.unwrap(), 0, "between frames");
    }

    #[tokio::test]
    async fn pings_that_nobody_reads_the_answers_of_have_an_end() {
        let (mut socket, mut peer) = client(256);
        let flood = async {
            let mut ping = vec![0x89, 0x7d];
            ping.extend([0; 125]);
            while peer.write_all(&ping).await.is_ok() {}
        };
        let read = poll_fn(|cx| {
            let mut bytes = [0; 8];
            Pin::new(&mut socket).poll_read(cx, &mut ReadBuf::new(&mut bytes))
        });
        tokio::select! {
            () = flood => panic!("the stream is gone"),
            read = read => assert!(read.is_err()),
        }
    }
}
