//! Two clusters that trust each other's workloads: bundles and their changes reach open streams, files
//! and the validation of tokens.

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use serde_json::Value;
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svidRequest,
    X509svidResponse,
};
use tonic::{Code, Streaming};

use crate::common::{Cluster, Process, RESOURCES, Sandbox, Workload, decode, eventually};

const AUDIENCE: &str = "audience.example.org";
const A: &str = "a.example.org";
const B: &str = "b.example.org";
const B_ID: &str = "spiffe://b.example.org";

fn agent(sandbox: &Sandbox, cluster: &Cluster<'_>) -> (Process, PathBuf) {
    let socket = sandbox.path("w.sock");
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + &format!(
            "services:\n- {{type: workload-identity-api, listen: \"unix://{}\", \
             selector: {{name: foo}}}}\noutputs:\n- {{type: workload-identity-x509, selector: \
             {{name: foo}}, include_federated_trust_bundles: true, \
             destination: {{type: directory, path: {}}}}}\n",
            socket.display(),
            sandbox.path("svid").display()
        );
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(config);
    (sandbox.spawn("agent", command), socket)
}

/// Reads a stream until `wanted` of a message.
async fn until<M: prost::Message + Default>(
    stream: &mut Streaming<Bytes>,
    wanted: impl Fn(&M) -> bool,
) -> M {
    let found = async {
        loop {
            let bytes = stream.message().await.unwrap().expect("a message");
            let message: M = decode(&bytes);
            if wanted(&message) {
                return message;
            }
        }
    };
    let patience = std::time::Duration::from_secs(30);
    tokio::time::timeout(patience, found)
        .await
        .expect("the change within 30 s")
}

async fn token(workload: &Workload) -> String {
    let request = JwtsvidRequest {
        audience: vec![AUDIENCE.to_owned()],
        ..JwtsvidRequest::default()
    };
    let fetched: JwtsvidResponse = workload.fetch("FetchJWTSVID", &request).await.unwrap();
    fetched.svids[0].svid.clone()
}

async fn validate(workload: &Workload, token: &str) -> Result<String, Code> {
    let request = ValidateJwtsvidRequest {
        audience: AUDIENCE.to_owned(),
        svid: token.to_owned(),
    };
    let valid = workload.fetch::<ValidateJwtsvidResponse>("ValidateJWTSVID", &request);
    let valid = valid.await.map_err(|status| status.code())?;
    Ok(valid.spiffe_id)
}

fn keys(jwks: &[u8]) -> usize {
    let jwks: Value = serde_json::from_slice(jwks).unwrap();
    jwks["keys"].as_array().unwrap().len()
}

fn federation(of: &Cluster<'_>) -> String {
    let url = format!("https://{}/webapi/spiffe/bundle.json", of.proxy());
    format!(
        "kind: spiffe_federation\nversion: v1\nmetadata: {{name: {B}}}\n\
         spec: {{bundle_source: {{https_web: {{bundle_endpoint_url: \"{url}\"}}}}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn another_clusters_workloads_are_trusted_as_long_as_it_says() {
    let sandboxes = [Sandbox::new(), Sandbox::new()];
    let mut b = Cluster::start_named(&sandboxes[1], B, RESOURCES);
    // What vouches for the endpoint of B: as for any program of this machine.
    let roots = b.web_authority();
    let roots = [("SSL_CERT_FILE", roots.to_str().unwrap())];
    let a = Cluster::start_named_in(&sandboxes[0], A, RESOURCES, &roots);
    let (_agent_a, socket_a) = agent(&sandboxes[0], &a);
    let (_agent_b, socket_b) = agent(&sandboxes[1], &b);
    let here = Workload::connect(&socket_a).await;
    let there = Workload::connect(&socket_b).await;

    let mut svids = here
        .open("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let mut bundles = here
        .open("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    let mut jwks = here
        .open("FetchJWTBundles", &JwtBundlesRequest {})
        .await
        .unwrap();
    let first: X509svidResponse = until(&mut svids, |_| true).await;
    assert!(first.federated_bundles.is_empty());
    let foreign = token(&there).await;
    assert_eq!(validate(&here, &foreign).await, Err(Code::InvalidArgument));

    a.create(&federation(&b));
    let own: X509svidResponse = until(
        &mut there
            .open("FetchX509SVID", &X509svidRequest {})
            .await
            .unwrap(),
        |_| true,
    )
    .await;
    let with_b = |message: &X509svidResponse| message.federated_bundles.contains_key(B_ID);
    let svid = until(&mut svids, with_b).await;
    assert_eq!(svid.federated_bundles[B_ID], own.svids[0].bundle);
    assert_eq!(svid.svids, first.svids, "nothing was issued for that");
    until(&mut bundles, |message: &X509BundlesResponse| {
        message.bundles.get(B_ID) == Some(&own.svids[0].bundle) && message.bundles.len() == 2
    })
    .await;
    until(&mut jwks, |message: &JwtBundlesResponse| {
        message.bundles.get(B_ID).is_some_and(|set| keys(set) == 1)
    })
    .await;
    let valid = validate(&here, &foreign).await;
    assert_eq!(valid.as_deref(), Ok("spiffe://b.example.org/svc/foo"));
    let file = sandboxes[0].path("svid/svid_bundle.pem");
    let certificates = || fs::read_to_string(&file).unwrap().matches("BEGIN").count();
    eventually("the files have both", || match certificates() {
        2 => Ok(()),
        other => Err(other),
    });
    let shown: Value =
        serde_json::from_str(&a.run(&["get", "spiffe_federation", "--format", "json"])).unwrap();
    let status = &shown[0]["status"];
    for key in ["current_bundle", "current_bundle_synced_at", "next_sync_at"] {
        assert!(status[key].is_string(), "{key}: {shown}");
    }
    assert_eq!(
        status["current_bundle_synced_from"],
        shown[0]["spec"]["bundle_source"]
    );

    // New keys are told before they sign; writing the federation anew asks at once.
    b.run(&["rotate", "--type", "spiffe", "--manual"]);
    a.create(&federation(&b));
    let both = until(&mut svids, |message: &X509svidResponse| {
        message.federated_bundles[B_ID].len() > own.svids[0].bundle.len()
    })
    .await;
    until(&mut jwks, |message: &JwtBundlesResponse| {
        keys(&message.bundles[B_ID]) == 2
    })
    .await;
    b.run(&["rotate", "--type", "spiffe", "--phase", "update_clients"]);
    eventually("the files have all three", || match certificates() {
        3 => Ok(()),
        other => Err(other),
    });

    // Who cannot be reached is believed as before.
    b.stop();
    a.create(&federation(&b));
    eventually("the failure is told", || {
        let log = fs::read_to_string(sandboxes[0].path("cluster.log")).unwrap();
        if log.contains("could not be fetched") {
            Ok(())
        } else {
            Err(log)
        }
    });
    let still: X509BundlesResponse = here
        .fetch("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    assert_eq!(still.bundles[B_ID], both.federated_bundles[B_ID]);
    assert!(validate(&here, &foreign).await.is_ok());

    // Who is not federated with any more is not believed.
    a.run(&["rm", &format!("spiffe_federation/{B}")]);
    until(&mut svids, |message: &X509svidResponse| {
        message.federated_bundles.is_empty()
    })
    .await;
    until(&mut jwks, |message: &JwtBundlesResponse| {
        message.bundles.len() == 1
    })
    .await;
    assert_eq!(validate(&here, &foreign).await, Err(Code::InvalidArgument));
    eventually("the files have one", || match certificates() {
        1 => Ok(()),
        other => Err(other),
    });
    for event in ["spiffe.federation.create", "spiffe.federation.delete"] {
        assert_eq!(a.events(event).len(), 1, "{event}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_in_the_resource_needs_nobody_and_may_lose_its_keys() {
    let sandbox = Sandbox::new();
    let a = Cluster::start_named(&sandbox, A, RESOURCES);
    let (_agent, socket) = agent(&sandbox, &a);
    let here = Workload::connect(&socket).await;
    let mut curl = sandbox.command("curl");
    let published = curl
        .args(["-sS", "--cacert"])
        .arg(a.web_authority())
        .arg(format!("https://{}/webapi/spiffe/bundle.json", a.proxy()))
        .output()
        .unwrap();
    let published = String::from_utf8(published.stdout).unwrap();
    let create = |bundle: &str| {
        a.create(&format!(
            "kind: spiffe_federation\nversion: v1\nmetadata: {{name: {B}}}\n\
             spec: {{bundle_source: {{static: {{bundle: '{bundle}'}}}}}}\n"
        ));
    };
    create(&published);
    let mut bundles = here
        .open("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    until(&mut bundles, |message: &X509BundlesResponse| {
        message.bundles.contains_key(B_ID)
    })
    .await;
    create("{\"keys\": []}");
    until(&mut bundles, |message: &X509BundlesResponse| {
        !message.bundles.contains_key(B_ID)
    })
    .await;
}
