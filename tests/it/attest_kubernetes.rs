//! The `kubernetes` attestor: real cgroups, and a kubelet that is late and wrong.

use crate::attest_docker::{agent, bridged, resources};
use crate::common::{Cgroup, Cluster, Kubelet, Sandbox, SelfSigned, identity, skip};

/// The list of a kubelet with one pod, whose second container has this ID.
fn list(uid: &str, container: &str) -> String {
    format!(
        r#"{{"kind": "PodList", "apiVersion": "v1", "metadata": {{}}, "items": [
        {{"metadata": {{"name": "web-0", "namespace": "shop", "uid": "{uid}", "labels": {{"app": "web"}}}},
          "spec": {{"serviceAccountName": "web", "containers": []}},
          "status": {{"containerStatuses": [
            {{"name": "waits", "image": "w", "imageID": "", "containerID": ""}},
            {{"name": "main", "image": "registry.example.org/web:1", "containerID": "containerd://{container}",
              "imageID": "registry.example.org/web@sha256:41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1572"}}
          ]}}}}]}}"#
    )
}

const OK: &str = "200 OK";

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_told_by_the_kubelet_and_by_where_they_are() {
    let uid = uuid::Uuid::new_v4().to_string();
    let id = "41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1572";
    let Some(pod) = Cgroup::make(&format!("kubepods/burstable/pod{uid}/{id}")) else {
        return skip("making cgroups needs root and cgroups of version 2");
    };
    let sandbox = Sandbox::new();
    let kubelet = Kubelet::start(&sandbox).await;
    let template = "/k8s/{{workload.kubernetes.namespace}}/{{workload.kubernetes.service_account}}/\
                    {{workload.kubernetes.pod_name}}/{{workload.kubernetes.container.name}}";
    let cluster = Cluster::start(&sandbox, &resources(template));
    let token = sandbox.write("token", "first\n");
    let attestor = format!(
        "kubernetes: {{enabled: true, kubelet: {{secure_port: {}, ca_path: '{}', token_path: '{}'}}}}",
        kubelet.port(),
        kubelet.authority().display(),
        token.display()
    );
    let node = [("TELEPORT_NODE_NAME", "localhost")];
    let mut agent = agent(&sandbox, &cluster, &attestor, &node);
    let (_web, web) = bridged(&sandbox, "web", Some(&pod));

    // The container is in the third list only.
    let other = list("another", id);
    let early = list(&uid, "another");
    let listed = list(&uid, id);
    kubelet.answer(&[(OK, &other), (OK, &early), (OK, &listed)]);
    let expected = format!("spiffe://{}/k8s/shop/web/web-0/main", Cluster::NAME);
    assert_eq!(identity(&web).await.unwrap(), expected);
    assert_eq!(kubelet.tokens(), vec![Some("Bearer first".to_owned()); 3]);

    // A process in no pod is not asked about, and one that imitates a pod below a service neither.
    let forged = format!("tbot-test-{uid}/evil.service/kubepods/pod{uid}/{id}");
    let forged = Cgroup::make(&forged).unwrap();
    for (name, cgroup) in [("host", None), ("forger", Some(&forged))] {
        let (_process, socket) = bridged(&sandbox, name, cgroup);
        assert!(identity(&socket).await.is_err(), "{name}");
    }
    assert_eq!(kubelet.tokens(), Vec::<Option<String>>::new());
    assert!(
        !agent.log().contains("Attestation failed"),
        "{}",
        agent.log()
    );

    // A refusal leaves the attributes unset; the next list has them again, asked for with a new token.
    kubelet.answer(&[("403 Forbidden", "Forbidden")]);
    while !agent.log().contains("nodes/proxy") {
        // The list of a moment ago is good enough for a second.
        drop(identity(&web).await);
        agent.check_running();
    }
    assert!(identity(&web).await.is_err());
    sandbox.write("token", "second");
    kubelet.answer(&[(OK, &listed)]);
    let mut again = identity(&web).await;
    while again.is_err() {
        // So is the refusal.
        again = identity(&web).await;
    }
    assert_eq!(again.unwrap(), expected);
    assert_eq!(kubelet.tokens().pop().unwrap().unwrap(), "Bearer second");
    agent.wait_for_log("Attestation works again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_is_shown_a_certificate_where_one_is_configured() {
    let uid = uuid::Uuid::new_v4().to_string();
    let id = "41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1573";
    let Some(pod) = Cgroup::make(&format!("kubepods/burstable/pod{uid}/{id}")) else {
        return skip("making cgroups needs root and cgroups of version 2");
    };
    let sandbox = Sandbox::new();
    let client = SelfSigned::new(&sandbox, "client", "DNS:tbot");
    let kubelet = Kubelet::start_for(&sandbox, Some(&client.certificate)).await;
    kubelet.answer(&[(OK, &list(&uid, id))]);
    let cluster = Cluster::start(
        &sandbox,
        &resources("/k8s/{{workload.kubernetes.pod_name}}"),
    );
    let certificate = sandbox.path("current.crt");
    let attestor = format!(
        "kubernetes: {{enabled: true, kubelet: {{secure_port: {}, ca_path: '{}', certificate_path: '{}', \
         private_key_path: '{}'}}}}",
        kubelet.port(),
        kubelet.authority().display(),
        certificate.display(),
        client.key.display()
    );
    let node = [("TELEPORT_NODE_NAME", "localhost")];
    let mut agent = agent(&sandbox, &cluster, &attestor, &node);
    let (_web, web) = bridged(&sandbox, "web", Some(&pod));
    // The files are read each time, also one that is not there yet.
    assert!(identity(&web).await.is_err());
    agent.wait_for_log("current.crt: No such file");
    std::fs::copy(&client.certificate, &certificate).unwrap();
    let mut told = identity(&web).await;
    while told.is_err() {
        told = identity(&web).await;
    }
    assert_eq!(
        told.unwrap(),
        format!("spiffe://{}/k8s/web-0", Cluster::NAME)
    );
    agent.wait_for_log("Attestation works again");
    assert!(kubelet.tokens().iter().all(Option::is_none), "no token too");
}
