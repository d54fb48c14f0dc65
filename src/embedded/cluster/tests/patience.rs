//! How long connections are kept that are used for nothing.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::lab::{AUTH, Lab, channel};
use crate::pb::proto::PingRequest;
use crate::pb::proto::auth_service_client::AuthServiceClient;

const PREFACE_AND_SETTINGS: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

#[tokio::test(start_paused = true)]
async fn silence_after_tls_ends_the_connection() {
    let lab = Lab::new().await;
    let (certs, key) = lab.joined().await;
    let begun: [&[u8]; 3] = [b"", b"PRI * HTTP/2.0\r\n\r\nSM", b"GET /webapi/find HTT"];
    for sent in begun {
        for protocols in [
            &[][..],
            &["http/1.1"],
            &["h2"],
            &["teleport-proxy-grpc", "h2"],
            &[AUTH, "h2"],
        ] {
            for certs in [None, Some((&certs, &key))] {
                let mut line = lab.connect(protocols, certs).await;
                line.stream.write_all(sent).await.unwrap();
                line.stream.flush().await.unwrap();
                let seconds = lab.seconds(line.served).await;
                assert!(seconds <= 60, "{protocols:?} after {sent:?}: {seconds} s");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_web_client_that_has_its_answer_does_not_stay() {
    let lab = Lab::new().await;
    let mut line = lab.connect(&["http/1.1"], None).await;
    let request = b"GET /webapi/find HTTP/1.1\r\nhost: x\r\n\r\n";
    line.stream.write_all(request).await.unwrap();
    let mut answer = [0; 12];
    line.stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    let seconds = lab.seconds(line.served).await;
    assert!((20..=60).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn strangers_that_call_nothing_are_sent_away_although_they_answer_pings() {
    let lab = Lab::new().await;
    for protocols in [&[AUTH, "h2"][..], &["teleport-proxy-grpc", "h2"], &["h2"]] {
        let line = lab.connect(protocols, None).await;
        let channel = channel(line.stream).await;
        let seconds = lab.seconds(line.served).await;
        assert!((60..=70).contains(&seconds), "{protocols:?}: {seconds}");
        drop(channel);
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_a_certificate_may_be_quiet_until_it_expires() {
    let lab = Lab::new().await;
    let (certs, key) = lab.joined().await;
    // Nobody answers pings here: the peer has gone without a word.
    let mut line = lab.connect(&[AUTH, "h2"], Some((&certs, &key))).await;
    line.stream.write_all(PREFACE_AND_SETTINGS).await.unwrap();
    let seconds = lab.seconds(line.served).await;
    assert!(seconds <= 90, "{seconds}");
    let line = lab.connect(&[AUTH, "h2"], Some((&certs, &key))).await;
    let mut client = AuthServiceClient::new(channel(line.stream).await);
    lab.clock.sleep(Duration::from_mins(45)).await;
    client.ping(PingRequest {}).await.unwrap();
    let seconds = lab.seconds(line.served).await;
    assert!((700..=930).contains(&seconds), "{seconds}");
}
