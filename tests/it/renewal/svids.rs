//! An output of SVIDs over a day of simulated time.

use std::collections::BTreeSet;

use super::*;

const WORKLOAD_IDENTITY: &str = "
kind: workload_identity
version: v1
metadata: {name: foo}
spec: {spiffe: {id: /svc/foo}}
";

#[tokio::test(start_paused = true)]
async fn a_day_of_svids_is_never_stale_and_they_are_issued_when_due_only() {
    let setup = Setup::new().await;
    let files = [("foo.yaml".to_owned(), WORKLOAD_IDENTITY.to_owned())];
    let state = setup.cluster.state();
    state.create(&files, Mode::Create, "test").unwrap();
    let (handle, running) = setup.start().await;
    handle.ready().await.unwrap();
    let source = Source {
        name: "tbot.yaml".to_owned(),
        text: "version: v2\nservices: [{type: workload-identity-x509, selector: {name: foo}, \
               destination: {type: memory}}]"
            .to_owned(),
    };
    let loaded = load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
    let Service::Output(output) = loaded.plan.services[0].plan.build() else {
        panic!("it writes files");
    };
    let place = output.destination();
    let context = Context {
        clock: setup.clock.clone(),
        identity: handle.clone(),
        lifetime: Lifetime::default(),
        name: "out".into(),
        health: setup.registry.reporter("out"),
        metrics: Metrics::new(),
        sockets: tbot::services::Sockets::default(),
        trust: tbot::services::Trust::default(),
        shelf: tbot::workload::Shelf::default(),
        shutdown: setup.shutdown.clone(),
    };
    let writing = tokio::spawn(output::run(output, None, context));
    tokio::time::sleep(Duration::from_secs(30)).await;
    let mut serials = BTreeSet::new();
    for minute in 0..24 * 60 {
        tokio::time::sleep(Duration::from_mins(1)).await;
        let svid = place.read("svid.pem").await.unwrap().expect("an SVID");
        let svid = String::from_utf8(svid.expose().clone()).unwrap();
        let svid = Certificate::from_pem(&svid).unwrap();
        let left = svid.not_after().duration_since(setup.clock.now());
        assert!(
            left.is_ok_and(|left| left > Duration::from_mins(20)),
            "minute {minute}: used past two thirds of its life"
        );
        serials.insert(svid.serial());
        let report = setup.registry.snapshot().services["out"].clone();
        assert_eq!(report.reason, None, "minute {minute}");
    }
    // Every 17 to 19 minutes, whatever lists of revocations the cluster signs meanwhile.
    assert!((72..=90).contains(&serials.len()), "{}", serials.len());
    setup.shutdown.cancel();
    writing.await.unwrap();
    running.await.unwrap();
}
