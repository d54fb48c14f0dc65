//! Notices when TLS fails because one side does not take the other's certificate.
//!
//! In TLS 1.3 a server's word about the client's certificate comes with the first bytes that are
//! read, and HTTP/2 only hands on the text of what went wrong there. So it is noted here, below it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use rustls::AlertDescription as Alert;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::ClusterError;

/// Whether a certificate was refused the last time. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Refused(Arc<AtomicBool>);

impl Refused {
    /// Whether it was.
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes note of a handshake that failed.
    pub(super) fn note(&self, error: &ClusterError) {
        if let ClusterError::Tls { source, .. } = error {
            self.note_io(source);
        }
    }

    /// The other side answers, so it took the certificate.
    fn clear(&self) {
        if self.is_set() {
            self.0.store(false, Ordering::Relaxed);
        }
    }

    fn note_io(&self, error: &io::Error) {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
        if tls.is_some_and(is_about_certificate) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn is_about_certificate(error: &rustls::Error) -> bool {
    match error {
        rustls::Error::InvalidCertificate(_) => true,
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            Alert::UnknownCA
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::AccessDenied
        ),
        _ => false,
    }
}

/// A TLS stream whose failures are noted.
#[derive(Debug)]
pub(super) struct Watched<S> {
    pub(super) stream: S,
    pub(super) refused: Refused,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        match &read {
            Poll::Ready(Ok(())) => self.refused.clear(),
            Poll::Ready(Err(error)) => self.refused.note_io(error),
            Poll::Pending => {}
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use rustls::{CertificateError, Error as Tls};
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn certificates_that_one_side_does_not_take_are_told_from_other_trouble() {
        for (tls, expected) in [
            (Tls::AlertReceived(Alert::UnknownCA), true),
            (
                Tls::InvalidCertificate(CertificateError::UnknownIssuer),
                true,
            ),
            (Tls::AlertReceived(Alert::InternalError), false),
            (Tls::DecryptError, false),
        ] {
            let io = || io::Error::new(io::ErrorKind::InvalidData, tls.clone());
            let opening = Refused::default();
            opening.note(&ClusterError::Tls {
                address: "a:1".into(),
                source: io(),
            });
            assert_eq!(opening.is_set(), expected, "{tls:?}");

            let refused = Refused::default();
            let mut stream = Watched {
                stream: Failing(Some(io())),
                refused: refused.clone(),
            };
            assert!(stream.read_u8().await.is_err());
            assert_eq!(refused.is_set(), expected, "{tls:?}");
            drop(stream.read(&mut [0]).await);
            assert!(!refused.is_set(), "another connection was answered");
        }
    }

    /// A stream that fails.
    struct Failing(Option<io::Error>);

    impl AsyncRead for Failing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _cx: &mut Context<'_>,
            _buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(self.0.take().map_or(Ok(()), Err))
        }
    }
}
