//! Cgroups of real containers, and of those who imitate them.

use super::super::cgroup::{Cgroups, Lookup};
use super::*;

const ID: &str = "76f4fe4f06cb3021b649257c1c291f285892c95ac6f3fdb61f9fdee87fbf46ec";
const POD: &str = "9b5ee4b7-4b4c-4f52-9bd8-0d6b6f1d3c2a";
const POD_: &str = "9b5ee4b7_4b4c_4f52_9bd8_0d6b6f1d3c2a";
const STATIC: &str = "1a44bc3b8f3dc2ddc6b4f6e2dba5e0f7";

/// The container and pod that a path names: `ID`, `POD` and `POD_` stand for real ones.
fn found(path: &str, lookup: Lookup) -> Result<Option<(String, Option<String>)>, String> {
    let path = path
        .replace("POD_", POD_)
        .replace("POD", POD)
        .replace("ID", ID);
    let place = Cgroups::parse(format!("0::{path}\n").as_bytes())
        .find(lookup)
        .map_err(|error| error.to_string())?;
    Ok(place.map(|place| (place.id, place.pod)))
}

#[test]
fn dockers_containers() {
    for path in [
        // Docker 20.10 to 28 with systemd; without; with a parent of one's own; a build.
        "/system.slice/docker-ID.scope",
        "/docker/ID",
        "/batch.slice/docker-ID.scope",
        "/docker/ID/init.scope",
        // Rootless: with systemd, without.
        "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/docker-ID.scope",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/ID",
        // Below a unit of its own, as Docker in a container of an agent's pod sees it.
        "/../../system.slice/docker-ID.scope",
        "/../docker/ID",
        // The node of kind, minikube or k3d, whatever runs in it.
        "/docker/ID/kubelet/kubepods/burstable/podPOD/0000000000000000000000000000000000000000000000000000000000000000",
        "/system.slice/docker-ID.scope/kubelet.slice/kubelet-kubepods.slice/x",
        // cri-dockerd: a pod's container is Docker's too.
        "/kubepods.slice/kubepods-podPOD_.slice/docker-ID.scope",
    ] {
        let id = found(path, docker).unwrap().map(|(id, _)| id);
        assert_eq!(id.as_deref(), Some(ID), "{path}");
    }
}

#[test]
fn podmans_containers() {
    for path in [
        // As root: with systemd, without, with crun's own level, in a unit of Quadlet.
        "/machine.slice/libpod-ID.scope",
        "/machine.slice/libpod-ID.scope/container",
        "/libpod_parent/libpod-ID",
        "/system.slice/web.service/libpod-payload-ID",
        // In a pod.
        "/machine.slice/machine-libpod_pod_ed168d4fda4861fb55f5a791b52ec4546517c248550b4835004afb033c647929.slice/libpod-ID.scope",
        "/libpod_parent/0486b5e6cef9e4a22291f61f86999258e193b9e982e33d092af10d1e16a9f75e/libpod-ID",
        // Rootless.
        "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope",
        "/user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_ed168d4fda4861fb55f5a791b52ec4546517c248550b4835004afb033c647929.slice/libpod-ID.scope/container",
        "/user.slice/user-0.slice/session-2.scope/libpod_parent/libpod-ID",
        // Of an agent in a container.
        "/../libpod-ID.scope/container",
    ] {
        let id = found(path, podman).unwrap().map(|(id, _)| id);
        assert_eq!(id.as_deref(), Some(ID), "{path}");
    }
}

#[test]
fn podman_without_systemd_does_not_say_which() {
    assert!(shared_by_podman("podman-4711.scope"));
    for name in ["podman-.scope", "podman-a.scope", "podman-1.service", "x"] {
        assert!(!shared_by_podman(name), "{name}");
    }
    // Where it may make cgroups, they lie below.
    let named = found(
        "/user.slice/podman-4711.scope/libpod_parent/libpod-ID",
        podman,
    );
    assert_eq!(named.unwrap().unwrap().0, ID);
}

#[test]
fn containers_of_pods() {
    for path in [
        // cgroupfs: containerd, cri-o.
        "/kubepods/burstable/podPOD/ID",
        "/kubepods/besteffort/podPOD/ID",
        "/kubepods/podPOD/ID",
        "/kubepods/burstable/podPOD/crio-ID",
        // systemd: containerd, cri-o, cri-dockerd, cri-o with crun's own level.
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podPOD_.slice/cri-containerd-ID.scope",
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podPOD_.slice/crio-ID.scope",
        "/kubepods.slice/kubepods-podPOD_.slice/docker-ID.scope",
        "/kubepods.slice/kubepods-podPOD_.slice/crio-ID.scope/container",
        // k3s, in itself and rootful in a container (k3d).
        "/kubepods/burstable/podPOD/ID/sub",
        "/docker/0000000000000000000000000000000000000000000000000000000000000000/kubepods/burstable/podPOD/ID",
        // kind, whose kubelet has a cgroup of its own.
        "/kubelet/kubepods/burstable/podPOD/ID",
        "/system.slice/docker-0000000000000000000000000000000000000000000000000000000000000000.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podPOD_.slice/cri-containerd-ID.scope",
        // containerd that was not told of systemd.
        "/system.slice/containerd.service/kubepods-burstable-podPOD_.slice:cri-containerd:ID",
        "/kubepods-besteffort-podPOD_.slice:cri-containerd:ID",
        // As an agent in a pod with a cgroup namespace of its own sees it.
        "/../../kubepods-burstable-podPOD_.slice/cri-containerd-ID.scope",
        "/../../podPOD/ID",
        "/../../../besteffort/podPOD/ID",
    ] {
        let named = found(path, kubernetes).unwrap();
        assert_eq!(named, Some((ID.into(), Some(POD.into()))), "{path}");
    }
    // Pods from a file on the node (etcd, the API server) have a hash for an UID.
    let path = format!("/kubepods/burstable/pod{STATIC}/ID");
    let named = found(&path, kubernetes).unwrap();
    assert_eq!(named, Some((ID.into(), Some(STATIC.into()))));
}

#[test]
fn what_is_no_container() {
    for path in [
        "/",
        "/..",
        "/init.scope",
        "/user.slice/user-1000.slice/session-3.scope",
        "/system.slice/docker.service",
        "/system.slice/containerd.service",
        // Monitors of containers run on the host.
        "/machine.slice/libpod-conmon-ID.scope",
        "/kubepods.slice/kubepods-podPOD_.slice/crio-conmon-ID.scope",
        // A pod without a container, and the other way round.
        "/kubepods/burstable/podPOD",
        "/kubepods.slice/kubepods-podPOD_.slice",
        "/../cri-containerd-ID.scope",
        "/kubepods/burstable/podPOD/x/ID",
        // Imitations that miss the form.
        "/docker/IDa",
        "/docker-ID.scope.d",
        "/docker-ID.service",
        "/docker/ID0",
        "/Docker/ID",
        "/libpod-",
        "/libpod-ID.slice",
        "/podPOD_x/ID",
        "/other-podPOD_.slice/ID",
        "/kubepods/podPOD/CRIO-ID",
        "/kubepods-podPOD_.slice:a:b:ID",
        "/kubepods/pod/ID",
        "/kubepods/pod--------------------------------/ID",
    ] {
        for lookup in [docker as Lookup, podman, kubernetes] {
            assert_eq!(found(path, lookup), Ok(None), "{path}");
        }
    }
    let upper = format!("/docker/{}", ID.to_uppercase());
    assert_eq!(found(&upper, docker), Ok(None));
}

#[test]
fn pods_are_not_where_others_make_cgroups() {
    for path in [
        "/user.slice/user-1000.slice/user@1000.service/kubepods/burstable/podPOD/ID",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/kubepods-podPOD_.slice/cri-containerd-ID.scope",
        "/system.slice/evil.service/kubepods/podPOD/ID",
        "/system.slice/evil.service/kubepods-podPOD_.slice:cri-containerd:ID",
        "/../../user@1000.service/podPOD/ID",
    ] {
        assert_eq!(found(path, kubernetes), Ok(None), "{path}");
    }
}
