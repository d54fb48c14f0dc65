//! HTTP/1.1 exchanges after which a connection is not HTTP any more: `CONNECT` and upgrades.

use std::io;

use futures_util::future::BoxFuture;
use http::{Request, response};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::client::conn::http1::Connection;
use hyper_util::rt::TokioIo;

use super::dial::BoxedIo;

/// The bytes of a request that has no body.
pub(super) type NoBody = Empty<Bytes>;

/// Sends `request` over `io`. Returns the head of the answer, and the stream that follows it where
/// the answer is a switch: `101`, or success for `CONNECT`.
pub(super) async fn switch(
    io: BoxedIo,
    request: Request<NoBody>,
) -> io::Result<(response::Parts, Option<BoxedIo>)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
        .await
        .map_err(io::Error::other)?;
    let connect = request.method() == http::Method::CONNECT;
    let exchange = async move {
        let mut response = sender.send_request(request).await?;
        let status = response.status();
        let switched = match status {
            http::StatusCode::SWITCHING_PROTOCOLS => true,
            _ => connect && status.is_success(),
        };
        let stream = if switched {
            let upgraded = hyper::upgrade::on(&mut response).await?;
            Some(Box::pin(TokioIo::new(upgraded)) as BoxedIo)
        } else {
            None
        };
        Ok::<_, hyper::Error>((response.into_parts().0, stream))
    };
    // The connection ends with the exchange: with the switch, or as nobody asks for more.
    let (answer, connection) = tokio::join!(exchange, driven(connection));
    match (answer, connection) {
        (Ok(answer), _) => Ok(answer),
        (Err(_), Err(source)) | (Err(source), Ok(())) => Err(io::Error::other(source)),
    }
}

/// A connection that hands its stream over when it is switched. Boxed: the compiler cannot show that
/// a future which holds it may move between threads.
fn driven(
    connection: Connection<TokioIo<BoxedIo>, NoBody>,
) -> BoxFuture<'static, hyper::Result<()>> {
    Box::pin(connection.with_upgrades())
}
