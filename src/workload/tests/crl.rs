use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::watch;
use tonic::Status;

use super::*;
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::crypto::x509::Certificate;
use crate::workload::crl::{Lists, follow, says_the_same, split};
use crate::workload::{Bundles, Crl, CrlFeed};

/// One DER element.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    if length < 128 {
        [&[tag, length], content].concat()
    } else {
        [&[tag, 0x81, length], content].concat()
    }
}

/// A list as clusters sign it: thisUpdate in the year 1, no nextUpdate unless told.
fn list(issuer: &str, revoked: &[u8], number: u8, next_update: bool) -> Bytes {
    let issuer = tlv(0x30, &tlv(0x0c, issuer.as_bytes()));
    list_of(
        &issuer,
        revoked,
        number,
        next_update.then_some("270101000000Z"),
    )
}

/// The same of an issuer whose name is encoded, and with this nextUpdate.
fn list_of(issuer: &[u8], revoked: &[u8], number: u8, next_update: Option<&str>) -> Bytes {
    let algorithm = tlv(0x30, &tlv(0x06, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]));
    let mut fields = tlv(0x02, &[1]);
    fields.extend(&algorithm);
    fields.extend(issuer);
    fields.extend(tlv(0x18, b"00010101000000Z"));
    if let Some(time) = next_update {
        fields.extend(tlv(0x17, time.as_bytes()));
    }
    if !revoked.is_empty() {
        let entries: Vec<u8> = revoked
            .iter()
            .flat_map(|serial| tlv(0x30, &tlv(0x02, &[*serial])))
            .collect();
        fields.extend(tlv(0x30, &entries));
    }
    fields.extend(tlv(0xa0, &tlv(0x30, &tlv(0x02, &[number]))));
    let signature = tlv(0x03, &[0, number]);
    tlv(0x30, &[tlv(0x30, &fields), algorithm, signature].concat()).into()
}

#[test]
fn only_the_meaning_counts() {
    let signed = Crl::Signed;
    let base = signed(list("ca", &[1, 2], 1, false));
    assert!(
        says_the_same(&base, &signed(list("ca", &[1, 2], 9, false))),
        "signed anew"
    );
    for (what, other) in [
        ("an entry more", list("ca", &[1, 2, 3], 1, false)),
        ("no entry", list("ca", &[], 1, false)),
        ("another issuer", list("cb", &[1, 2], 1, false)),
        ("a nextUpdate", list("ca", &[1, 2], 1, true)),
        ("no list", Bytes::from_static(b"junk")),
    ] {
        assert!(!says_the_same(&base, &signed(other)), "{what}");
    }
    assert!(says_the_same(
        &signed(list("ca", &[], 1, false)),
        &signed(list("ca", &[], 2, false))
    ));
    // With a nextUpdate, the newest one is the one to have.
    assert!(!says_the_same(
        &signed(list("ca", &[1], 1, true)),
        &signed(list("ca", &[1], 2, true))
    ));
    // Bytes that cannot be read are compared as bytes.
    let junk = || signed(Bytes::from_static(b"junk"));
    assert!(says_the_same(&junk(), &junk()));
    assert!(!says_the_same(&Crl::Pending, &Crl::None));
}

/// Gives one script after the other; then nothing more.
#[derive(Debug)]
struct Feed(Mutex<Vec<Result<Vec<Bytes>, Status>>>);

#[async_trait]
impl CrlFeed for Feed {
    async fn lists(&self) -> Result<Lists, ClusterError> {
        let mut scripts = self.0.lock().unwrap();
        if scripts.is_empty() {
            return Ok(futures_util::stream::pending().boxed());
        }
        let lists = scripts
            .remove(0)
            .map_err(ClusterError::call("StreamSignedCRL"))?;
        Ok(futures_util::stream::iter(lists.into_iter().map(Ok)).boxed())
    }
}

/// What is never heard of.
fn no_bundles() -> watch::Receiver<Option<Arc<Bundles>>> {
    watch::channel(None).1
}

async fn followed(scripts: Vec<Result<Vec<Bytes>, Status>>) -> (Crl, u32) {
    let (sender, mut receiver) = watch::channel(Crl::Pending);
    let feed = Feed(Mutex::new(scripts));
    let clock = Clock::simulated(start());
    let mut wakes = 0;
    let count = async {
        while receiver.changed().await.is_ok() {
            receiver.borrow_and_update();
            wakes += 1;
        }
    };
    tokio::select! {
        () = follow(&feed, &clock, no_bundles(), &sender) => {}
        () = count => {}
        () = tokio::time::sleep(HOUR) => {}
    }
    let crl = sender.borrow().clone();
    (crl, wakes)
}

#[tokio::test(start_paused = true)]
async fn a_list_signed_anew_wakes_nobody_and_replaces_the_bytes() {
    let (first, second) = (list("ca", &[1], 1, false), list("ca", &[1], 2, false));
    // The second one comes after a reconnect.
    let (crl, wakes) = followed(vec![
        Ok(vec![first]),
        Err(Status::unavailable("x")),
        Ok(vec![second.clone()]),
    ])
    .await;
    assert_eq!(crl, Crl::Signed(second));
    assert_eq!(wakes, 1);
}

#[tokio::test(start_paused = true)]
async fn a_cluster_without_lists_does_not_hold_readers_up() {
    assert_eq!(
        followed(vec![Err(Status::unimplemented("x"))]).await,
        (Crl::None, 1)
    );
    assert_eq!(followed(Vec::new()).await, (Crl::None, 1));
    assert_eq!(followed(vec![Ok(vec![Bytes::new()])]).await, (Crl::None, 1));
}

/// A cluster that never answers, and counts how often it was asked.
#[derive(Debug, Default)]
struct Mute(Mutex<u32>);

#[async_trait]
impl CrlFeed for Mute {
    async fn lists(&self) -> Result<Lists, ClusterError> {
        *self.0.lock().unwrap() += 1;
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_does_not_answer_or_refuses_does_not_hold_readers_up() {
    let clock = Clock::simulated(start());
    let refusing = Feed(Mutex::new(vec![
        Err(Status::permission_denied("x")),
        Err(Status::unavailable("x")),
        Err(Status::unavailable("x")),
        Err(Status::unavailable("x")),
    ]));
    let mute = Mute::default();
    for feed in [&refusing as &dyn CrlFeed, &mute] {
        let (sender, mut receiver) = watch::channel(Crl::Pending);
        let known = async {
            receiver.changed().await.unwrap();
            receiver.borrow_and_update().clone()
        };
        tokio::select! {
            () = follow(feed, &clock, no_bundles(), &sender) => unreachable!(),
            crl = known => assert_eq!(crl, Crl::None),
            () = tokio::time::sleep(Duration::from_secs(3)) => panic!("readers still wait"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_does_not_answer_is_asked_again() {
    let mute = Mute::default();
    let (sender, _receiver) = watch::channel(Crl::Pending);
    let clock = Clock::simulated(start());
    tokio::select! {
        () = follow(&mute, &clock, no_bundles(), &sender) => {}
        () = tokio::time::sleep(HOUR) => {}
    }
    assert!((2..20).contains(&*mute.0.lock().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn the_first_list_is_asked_for_without_long_pauses() {
    let away = || (0..60).map(|_| Err(Status::unavailable("x")));
    let [first, second] = [1, 2].map(|number| list("ca", &[number], number, false));
    let scripts = away().chain([Ok(vec![first.clone()])]);
    let (crl, _) = followed(scripts.collect()).await;
    assert_eq!(crl, Crl::Signed(first.clone()));
    // News can wait.
    let scripts = away().chain([Ok(vec![second])]);
    let scripts = [Ok(vec![first.clone()])].into_iter().chain(scripts);
    let (crl, _) = followed(scripts.collect()).await;
    assert_eq!(crl, Crl::Signed(first));
}

#[tokio::test(start_paused = true)]
async fn the_last_list_outlives_the_stream() {
    let first = list("ca", &[1], 1, false);
    let (crl, _) = followed(vec![Ok(vec![first.clone()]), Err(Status::unavailable("x"))]).await;
    assert_eq!(crl, Crl::Signed(first));
}

/// Lists in the order in which they come; what was published after each, and after the next bundle.
async fn followed_beside(
    bundles: [&[&Authority]; 2],
    lists: &[&Bytes],
) -> (Vec<Vec<Bytes>>, Vec<Bytes>) {
    let bundle = |authorities| {
        let bundles = Bundles::from_authority(&message(DOMAIN, authorities)).unwrap();
        Some(Arc::new(bundles))
    };
    let (told, heard) = watch::channel(bundle(bundles[0]));
    let (sender, mut receiver) = watch::channel(Crl::Pending);
    let script = lists.iter().map(|&list| Ok(list.clone()));
    let script: Vec<_> = script.collect();
    let feed = Once(Mutex::new(Some(script)));
    let clock = Clock::simulated(start());
    let mut seen = Vec::new();
    let last = |crl: &Crl| crl.der().map(split).unwrap_or_default();
    let read = async {
        for _ in lists {
            receiver.changed().await.unwrap();
            seen.push(last(&receiver.borrow_and_update()));
        }
        told.send_replace(bundle(bundles[1]));
        tokio::time::sleep(Duration::from_secs(1)).await;
        last(&receiver.borrow())
    };
    let after = tokio::select! {
        () = follow(&feed, &clock, heard, &sender) => unreachable!(),
        after = read => after,
    };
    (seen, after)
}

/// Gives one script, and stays open.
#[derive(Debug)]
struct Once(Mutex<Option<Vec<Result<Bytes, ClusterError>>>>);

#[async_trait]
impl CrlFeed for Once {
    async fn lists(&self) -> Result<Lists, ClusterError> {
        let script = self.0.lock().unwrap().take().unwrap_or_default();
        let lists = futures_util::stream::iter(script);
        Ok(lists.chain(futures_util::stream::pending()).boxed())
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_list_of_each_authority_is_kept_while_the_bundle_has_it() {
    let [old, new, gone] = ["old", "new", "gone"].map(Authority::new);
    let by = |authority: &Authority, number, next_update| {
        let certificate = Certificate::from_der(&authority.der).unwrap();
        list_of(&certificate.subject_der(), &[7], number, next_update)
    };
    let later = Some("270101000000Z");
    let (first, second, third) = (by(&old, 1, later), by(&new, 2, later), by(&new, 3, later));
    let stranger = by(&gone, 4, None);
    let (seen, after) = followed_beside(
        [&[&old, &new], &[&new]],
        &[&stranger, &first, &second, &third],
    )
    .await;
    let expected = [
        vec![&stranger],
        vec![&first],
        vec![&second, &first],
        vec![&third, &first],
    ];
    assert_eq!(
        seen,
        expected.map(|lists| lists.into_iter().cloned().collect::<Vec<_>>())
    );
    assert_eq!(after, [third], "the old authority left the bundle");

    // One that is over is of no use to anybody.
    let over = by(&old, 1, Some("250101000000Z"));
    let both: [&[&Authority]; 2] = [&[&old, &new], &[&old, &new]];
    let (seen, after) = followed_beside(both, &[&over, &second]).await;
    assert_eq!(seen, [vec![over], vec![second.clone()]]);
    assert_eq!(after, [second]);

    // What cannot be read stands alone, and is passed on.
    let junk = Bytes::from_static(b"junk");
    let (seen, _) = followed_beside(both, &[&first, &junk]).await;
    assert_eq!(seen, [vec![first], vec![junk]]);
}

/// What is published when an agent begins with `stored` lists and these scripts, and hears the bundle a
/// minute later: just before, and just after.
async fn restarted(
    stored: &[&Bytes],
    scripts: Vec<Result<Vec<Bytes>, Status>>,
    authorities: &[&Authority],
) -> [Vec<Bytes>; 2] {
    let lists = stored.iter().flat_map(|list| list.to_vec()).collect();
    let stored = if stored.is_empty() {
        Crl::Pending
    } else {
        Crl::Signed(lists)
    };
    let (sender, receiver) = watch::channel(stored);
    let (told, heard) = watch::channel(None);
    let bundles = Bundles::from_authority(&message(DOMAIN, authorities)).unwrap();
    let feed = Feed(Mutex::new(scripts));
    let clock = Clock::simulated(start());
    let minute = Duration::from_mins(1);
    let seen = || receiver.borrow().der().map(split).unwrap_or_default();
    let read = async {
        tokio::time::sleep(minute).await;
        let before = seen();
        told.send_replace(Some(Arc::new(bundles)));
        tokio::time::sleep(minute).await;
        [before, seen()]
    };
    tokio::select! {
        () = follow(&feed, &clock, heard, &sender) => unreachable!(),
        seen = read => seen,
    }
}

#[tokio::test(start_paused = true)]
async fn lists_of_before_a_restart_stand_until_the_cluster_is_heard() {
    let [old, new, gone] = ["old", "new", "gone"].map(Authority::new);
    let by = |authority: &Authority, number, next_update| {
        let certificate = Certificate::from_der(&authority.der).unwrap();
        list_of(&certificate.subject_der(), &[7], number, next_update)
    };
    let later = Some("270101000000Z");
    let (first, second, stranger) = (by(&new, 1, later), by(&old, 2, None), by(&gone, 3, later));
    let over = by(&old, 4, Some("250101000000Z"));
    let stored = [&first, &second];
    let both = [first.clone(), second.clone()];
    let away = || vec![Err(Status::unavailable("x"))];

    let seen = restarted(&stored, away(), &[&new, &old]).await;
    assert_eq!(seen, [both.to_vec(), both.to_vec()]);
    // Nobody vouches for them any more, or they are over.
    let seen = restarted(&stored, away(), &[&old]).await;
    assert_eq!(seen, [both.to_vec(), vec![second.clone()]]);
    let seen = restarted(&[&stranger, &over], away(), &[&new, &old]).await;
    assert_eq!(seen, [vec![stranger, over], vec![]]);
    // The cluster has none.
    for none in [Err(Status::unimplemented("x")), Ok(vec![Bytes::new()])] {
        let seen = restarted(&stored, vec![none], &[&new, &old]).await;
        assert_eq!(seen, [const { Vec::<Bytes>::new() }; 2]);
    }
}

#[tokio::test(start_paused = true)]
async fn lists_that_come_before_the_bundle_wait_for_it() {
    let [old, new] = ["old", "new"].map(Authority::new);
    let [old_list, new_list] = [&old, &new].map(|authority| {
        let certificate = Certificate::from_der(&authority.der).unwrap();
        list_of(&certificate.subject_der(), &[7], 1, None)
    });
    let strangers = (0..20).map(|number| list(&format!("ca {number}"), &[7], number, true));
    let strangers: Vec<Bytes> = strangers.collect();
    let both = [new_list.clone(), old_list.clone()];
    let lists = strangers.iter().cloned().chain([old_list, new_list]);
    let [before, after] = restarted(&[], vec![Ok(lists.collect())], &[&new, &old]).await;
    assert_eq!(before[..2], both);
    assert!(before.len() < strangers.len(), "{} lists", before.len());
    assert_eq!(after, both);
}

#[test]
fn fuzz_lists() {
    let sample = list("ca", &[1, 2, 3], 1, false);
    let check = bolero::check!().with_type::<(Vec<(u16, u8)>, u16)>();
    check.for_each(|(edits, end)| {
        let mut bytes = sample.to_vec();
        for (place, octet) in edits.iter().take(6) {
            let at = usize::from(*place) % bytes.len();
            bytes[at] = *octet;
        }
        if edits.len() % 4 == 3 {
            bytes.truncate(usize::from(*end) % bytes.len());
        }
        let (old, new) = (Crl::Signed(sample.clone()), Crl::Signed(bytes.into()));
        assert!(says_the_same(&new, &new));
        assert_eq!(says_the_same(&old, &new), says_the_same(&new, &old));
    });
}
