//! The kubelet's list of pods, as far as it is used.

use std::collections::HashMap;

use serde::Deserialize;

use crate::pb::teleport::workloadidentity::v1::{
    WorkloadAttrsKubernetes, WorkloadAttrsKubernetesContainer,
};

/// The answer to `GET /pods`.
#[derive(Debug, Deserialize)]
#[serde(try_from = "PodList")]
pub(super) struct Pods(HashMap<String, Pod>);

#[derive(Debug, Deserialize)]
struct PodList {
    kind: String,
    items: Option<Vec<Pod>>,
}

impl TryFrom<PodList> for Pods {
    type Error = String;

    fn try_from(list: PodList) -> Result<Self, String> {
        if list.kind != "PodList" {
            return Err(format!("it is a {:?}, not a PodList", list.kind));
        }
        let pods = list.items.unwrap_or_default().into_iter();
        Ok(Self(
            pods.map(|pod| (pod.metadata.uid.clone(), pod)).collect(),
        ))
    }
}

#[derive(Debug, Deserialize)]
struct Pod {
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    uid: String,
    name: String,
    #[serde(default)]
    namespace: String,
    labels: Option<HashMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    service_account_name: String,
    init_containers: Option<Vec<InitContainer>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct InitContainer {
    name: String,
    restart_policy: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Status {
    #[serde(rename = "containerStatuses")]
    regular: Option<Vec<Container>>,
    #[serde(rename = "initContainerStatuses")]
    init: Option<Vec<Container>>,
    #[serde(rename = "ephemeralContainerStatuses")]
    ephemeral: Option<Vec<Container>>,
}

#[derive(Debug, Deserialize)]
struct Container {
    name: String,
    #[serde(default)]
    image: String,
    #[serde(default, rename = "imageID")]
    image_id: String,
    /// `containerd://<id>`; absent before the container starts.
    #[serde(default, rename = "containerID")]
    id: String,
}

/// What a list tells of a container.
#[derive(Debug, PartialEq)]
pub(super) enum Sight {
    /// All there is to know.
    Known(WorkloadAttrsKubernetes),
    /// The pod is there and does not have the container yet.
    Pod(WorkloadAttrsKubernetes),
    /// An init container that ends before the others start.
    Init { pod: String, container: String },
    /// There is no such pod.
    Nothing,
}

impl Pods {
    /// Looks for the container of this ID in the pod of this UID.
    pub(super) fn look(&self, uid: &str, container: &str) -> Sight {
        let Some(pod) = self.0.get(uid) else {
            return Sight::Nothing;
        };
        let among = |statuses: &Option<Vec<Container>>| {
            let mut statuses = statuses.iter().flatten();
            let found = statuses.find(|status| status.is(container));
            found.map(Container::attributes)
        };
        if let Some(found) = among(&pod.status.regular) {
            return Sight::Known(pod.attributes(Some(found)));
        }
        if let Some(found) = among(&pod.status.init) {
            if pod.has_sidecar(&found.name) {
                return Sight::Known(pod.attributes(Some(found)));
            }
            return Sight::Init {
                pod: pod.metadata.name.clone(),
                container: found.name,
            };
        }
        // Somebody debugs the pod: upstream tells of the pod only.
        if among(&pod.status.ephemeral).is_some() {
            return Sight::Known(pod.attributes(None));
        }
        Sight::Pod(pod.attributes(None))
    }
}

impl Pod {
    /// Whether this init container runs as long as the pod does.
    fn has_sidecar(&self, name: &str) -> bool {
        let mut init = self.spec.init_containers.iter().flatten();
        init.any(|init| init.name == name && init.restart_policy.as_deref() == Some("Always"))
    }

    fn attributes(
        &self,
        container: Option<WorkloadAttrsKubernetesContainer>,
    ) -> WorkloadAttrsKubernetes {
        WorkloadAttrsKubernetes {
            attested: true,
            namespace: self.metadata.namespace.clone(),
            pod_name: self.metadata.name.clone(),
            service_account: self.spec.service_account_name.clone(),
            pod_uid: self.metadata.uid.clone(),
            labels: self.metadata.labels.clone().unwrap_or_default(),
            container,
        }
    }
}

impl Container {
    fn is(&self, id: &str) -> bool {
        self.id
            .split_once("://")
            .is_some_and(|(_, known)| known == id)
    }

    fn attributes(&self) -> WorkloadAttrsKubernetesContainer {
        WorkloadAttrsKubernetesContainer {
            name: self.name.clone(),
            image: self.image.clone(),
            image_digest: digest(&self.image_id).unwrap_or_default(),
        }
    }
}

/// The first `sha256:` with 64 hex digits.
fn digest(text: &str) -> Option<String> {
    text.match_indices("sha256:").find_map(|(at, prefix)| {
        let from = at + prefix.len();
        let hex = text.get(from..from + 64)?;
        hex.bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            .then(|| format!("{prefix}{hex}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "9b5ee4b7-4b4c-4f52-9bd8-0d6b6f1d3c2a";
    /// A list as a kubelet of 1.31 gives it, with fields that are not used.
    const RECORDED: &str = r#"{"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [
      {"metadata": {"name": "web-0", "namespace": "shop", "uid": "9b5ee4b7-4b4c-4f52-9bd8-0d6b6f1d3c2a",
         "labels": {"app": "web"}, "annotations": {"kubernetes.io/config.seen": "x"}},
       "spec": {"serviceAccountName": "web", "nodeName": "n1",
         "initContainers": [{"name": "migrate", "image": "m"}, {"name": "proxy", "restartPolicy": "Always"}],
         "containers": [{"name": "main", "resources": {}}]},
       "status": {"phase": "Running",
         "initContainerStatuses": [
           {"name": "migrate", "image": "m:1", "imageID": "m@sha256:1", "containerID": "containerd://aa", "state": {}},
           {"name": "proxy", "image": "p:1", "imageID": "", "containerID": "containerd://bb"}],
         "containerStatuses": [
           {"name": "waits", "image": "w:1", "imageID": "", "containerID": ""},
           {"name": "main", "image": "registry.example.org/web:1",
            "imageID": "registry.example.org/web@sha256:41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1572",
            "containerID": "containerd://cc", "ready": true}],
         "ephemeralContainerStatuses": [{"name": "debugger", "containerID": "containerd://dd"}]}},
      {"metadata": {"name": "bare", "namespace": "kube-system", "uid": "1a44bc3b8f3dc2ddc6b4f6e2dba5e0f7"},
       "spec": {}, "status": {}}]}"#;

    fn look(uid: &str, id: &str) -> Sight {
        serde_json::from_str::<Pods>(RECORDED)
            .unwrap()
            .look(uid, id)
    }

    #[test]
    fn containers_are_told_with_their_pods() {
        let Sight::Known(found) = look(UID, "cc") else {
            panic!("the container is known");
        };
        assert!(found.attested);
        assert_eq!(
            (&*found.namespace, &*found.pod_name, &*found.service_account),
            ("shop", "web-0", "web")
        );
        assert_eq!((&*found.pod_uid, &*found.labels["app"]), (UID, "web"));
        let container = found.container.unwrap();
        assert_eq!(container.name, "main");
        assert_eq!(container.image, "registry.example.org/web:1");
        assert!(container.image_digest.starts_with("sha256:41b0"));
    }

    #[test]
    fn init_containers_count_if_they_are_sidecars() {
        let Sight::Known(found) = look(UID, "bb") else {
            panic!("a sidecar is known");
        };
        let container = found.container.unwrap();
        assert_eq!((&*container.name, &*container.image_digest), ("proxy", ""));
        let init = Sight::Init {
            pod: "web-0".into(),
            container: "migrate".into(),
        };
        assert_eq!(look(UID, "aa"), init);
    }

    #[test]
    fn what_is_not_there_yet_is_told_apart() {
        let Sight::Known(found) = look(UID, "dd") else {
            panic!("nobody waits for what debugs");
        };
        assert_eq!(found.container, None);
        assert!(matches!(look(UID, "ee"), Sight::Pod(_)));
        // A container that has no ID yet is not the one without.
        assert!(matches!(look(UID, ""), Sight::Pod(_)));
        assert!(matches!(
            look("1a44bc3b8f3dc2ddc6b4f6e2dba5e0f7", "cc"),
            Sight::Pod(_)
        ));
        assert_eq!(look("x", "cc"), Sight::Nothing);
    }

    #[test]
    fn other_answers_are_refused() {
        for wrong in [
            "",
            "{}",
            "[]",
            "<html>",
            r#"{"kind": "Status", "message": "no"}"#,
            r#"{"kind": "PodList", "items": [{}]}"#,
            r#"{"kind": "PodList", "items": [{"metadata": {"name": "x"}}]}"#,
            r#"{"kind": "PodList", "items": []} x"#,
        ] {
            assert!(serde_json::from_str::<Pods>(wrong).is_err(), "{wrong}");
        }
        for empty in [
            r#"{"kind": "PodList", "items": null}"#,
            r#"{"kind": "PodList"}"#,
        ] {
            let pods: Pods = serde_json::from_str(empty).unwrap();
            assert_eq!(pods.look("x", "y"), Sight::Nothing);
        }
    }

    #[test]
    fn fuzz_lists() {
        let check = bolero::check!().with_type::<(Vec<(u16, u8)>, u16)>();
        check.for_each(|(edits, end)| {
            let mut list = RECORDED.as_bytes().to_vec();
            for (place, octet) in edits.iter().take(6) {
                let at = usize::from(*place) % list.len();
                list[at] = *octet;
            }
            if edits.len() % 4 == 3 {
                list.truncate(usize::from(*end));
            }
            let Ok(pods) = serde_json::from_slice::<Pods>(&list) else {
                return;
            };
            for id in ["cc", "bb", "aa", "dd", "ee", ""] {
                let Sight::Known(found) = pods.look(UID, id) else {
                    continue;
                };
                assert!(found.attested && found.pod_uid == UID, "{found:?}");
                let image = found.container.map(|container| container.image_digest);
                let digest = image.unwrap_or_default();
                assert!(digest.is_empty() || digest.len() == "sha256:".len() + 64);
            }
        });
    }

    #[test]
    fn digests_are_found_wherever_they_stand() {
        let hex = "41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1572";
        for text in [
            format!("sha256:{hex}"),
            format!("docker-pullable://x/y@sha256:{hex}"),
            format!("sha256:short@sha256:{hex}"),
        ] {
            assert_eq!(digest(&text).unwrap(), format!("sha256:{hex}"), "{text}");
        }
        for text in [
            "",
            "sha256:",
            "x:latest",
            &format!("sha256:{}", hex.to_uppercase()),
        ] {
            assert_eq!(digest(text), None, "{text}");
        }
    }
}
