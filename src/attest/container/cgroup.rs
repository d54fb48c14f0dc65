//! `/proc/<pid>/cgroup` (`cgroups(7)`).

use std::io;

use super::ContainerError;
use crate::fsx::read_proc;

/// The longest `/proc/<pid>/cgroup` that is read, in bytes. A path has at most 4 KiB, and there are
/// at most a dozen hierarchies.
const MAX_FILE: u64 = 64 * 1024;

/// What one level of a path says, for the engine that one looks for. Gets the components from the
/// outermost one up to and including the level.
pub(crate) type Lookup = fn(&[&str]) -> Option<Named>;

/// What the name of a cgroup says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    /// The container's ID: 64 lower-case hex digits.
    pub(crate) id: String,
    /// The pod's UID, for pods of Kubernetes.
    pub(crate) pod: Option<String>,
}

/// The cgroup that makes a container of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The container's ID: 64 lower-case hex digits.
    pub(crate) id: String,
    /// The pod's UID, with `-`, for pods of Kubernetes.
    pub(crate) pod: Option<String>,
    /// The path up to the level that names the container.
    pub(crate) level: String,
    /// The hierarchy that the path is of.
    hierarchy: String,
}

/// The cgroups of a process: one for each hierarchy of version 1, and one of version 2.
#[derive(Debug)]
pub(crate) struct Cgroups(Vec<Cgroup>);

#[derive(Debug)]
struct Cgroup {
    /// Number and controllers.
    hierarchy: String,
    /// Starts with `/`; as seen from the reader's cgroup namespace, so the first components may be
    /// `..`.
    path: String,
}

impl Cgroups {
    /// Those of a running process. May wait for the kernel.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let bytes = read_proc(format!("/proc/{pid}/cgroup"), MAX_FILE)?;
        Ok(Self::parse(&bytes))
    }

    /// Reads the file. Lines that no engine writes are left out.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let cgroup = |line: &[u8]| {
            // A name that is no text was made by hand.
            let line = std::str::from_utf8(line).ok()?;
            let (hierarchy, path) = split(line)?;
            Some(Cgroup {
                hierarchy: hierarchy.to_owned(),
                path: path.to_owned(),
            })
        };
        Self(
            bytes
                .split(|&byte| byte == b'\n')
                .filter_map(cgroup)
                .collect(),
        )
    }

    /// The container that the outermost fitting level names. Levels below it are the container's own
    /// to make and to name.
    pub(crate) fn find(&self, lookup: Lookup) -> Result<Option<Place>, ContainerError> {
        let mut found: Option<Place> = None;
        for cgroup in &self.0 {
            let Some(place) = cgroup.find(lookup) else {
                continue;
            };
            match &found {
                Some(known) if (&known.id, &known.pod) != (&place.id, &place.pod) => {
                    return Err(ContainerError::Contradiction {
                        first: known.id.clone(),
                        second: place.id,
                    });
                }
                Some(_) => {}
                None => found = Some(place),
            }
        }
        Ok(found)
    }

    /// Whether any level of any cgroup has such a name.
    pub(crate) fn any(&self, named: fn(&str) -> bool) -> bool {
        self.0.iter().any(|cgroup| cgroup.components().any(named))
    }

    /// Whether a process with these cgroups is in `place`, or below.
    pub(crate) fn are_in(&self, place: &Place) -> bool {
        self.0.iter().any(|cgroup| {
            let below = cgroup.path.strip_prefix(&place.level);
            cgroup.hierarchy == place.hierarchy
                && below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
        })
    }
}

impl Cgroup {
    fn find(&self, lookup: Lookup) -> Option<Place> {
        let components: Vec<&str> = self.components().collect();
        (1..=components.len()).find_map(|length| {
            let outer = components.get(..length)?;
            let Named { id, pod } = lookup(outer)?;
            Some(Place {
                id,
                pod,
                level: format!("/{}", outer.join("/")),
                hierarchy: self.hierarchy.clone(),
            })
        })
    }

    fn components(&self) -> impl Iterator<Item = &str> {
        self.path.split('/').skip(1)
    }
}

/// Number and controllers of a line, and its path.
fn split(line: &str) -> Option<(&str, &str)> {
    let number = line.find(':')?;
    // Names of controllers have no colon; paths may.
    let controllers = line.get(number + 1..)?.find(':')?;
    let (hierarchy, path) = line.split_at_checked(number + 1 + controllers)?;
    let path = path.strip_prefix(':')?;
    path.starts_with('/').then_some((hierarchy, path))
}

#[cfg(test)]
mod tests {
    use super::super::level::{docker, kubernetes, podman};
    use super::*;

    const A: &str = "76f4fe4f06cb3021b649257c1c291f285892c95ac6f3fdb61f9fdee87fbf46ec";
    const B: &str = "6f472c80b01ec66aa8454a8245ae9fa5e19437a920c068437c55c91ecb50083f";

    fn find(file: &str, lookup: Lookup) -> Result<Option<Place>, String> {
        let cgroups = Cgroups::parse(file.as_bytes());
        cgroups.find(lookup).map_err(|error| error.to_string())
    }

    fn id(file: &str, lookup: Lookup) -> Option<String> {
        find(file, lookup).unwrap().map(|place| place.id)
    }

    #[test]
    fn any_hierarchy_may_name_the_container() {
        // Version 2; a mixture; version 1 where another runtime owns version 2.
        for file in [
            format!("0::/docker/{A}\n"),
            format!("9:name=systemd:/docker/{A}\n1:cpu:/docker/{A}\n0::/docker/{A}\n"),
            format!("4:memory:/docker/{A}\n1:cpu,cpuacct:/\n0::/system.slice/x.service\n"),
        ] {
            assert_eq!(id(&file, docker).as_deref(), Some(A), "{file}");
        }
    }

    #[test]
    fn hierarchies_must_not_contradict_each_other() {
        let file = format!("9:name=systemd:/docker/{A}\n0::/docker/{B}\n");
        let error = find(&file, docker).unwrap_err();
        assert!(error.contains(A) && error.contains(B), "{error}");
    }

    #[test]
    fn the_outermost_level_counts() {
        for (below, lookup) in [
            (format!("docker/{A}/docker/{B}"), docker as Lookup),
            (
                format!("system.slice/docker-{A}.scope/docker-{B}.scope"),
                docker,
            ),
            (
                format!("machine.slice/libpod-{A}.scope/libpod-{B}.scope/x"),
                podman,
            ),
            (
                format!(
                    "kubepods/pod9b5ee4b7-4b4c-4f52-9bd8-0d6b6f1d3c2a/{A}/\
                     pod00000000-0000-0000-0000-000000000000/{B}"
                ),
                kubernetes,
            ),
        ] {
            assert_eq!(
                id(&format!("0::/{below}\n"), lookup).as_deref(),
                Some(A),
                "{below}"
            );
        }
    }

    #[test]
    fn a_place_is_held_by_its_own_processes_only() {
        let place = find(&format!("1:cpu:/docker/{A}/x\n"), docker)
            .unwrap()
            .unwrap();
        assert_eq!(place.level, format!("/docker/{A}"));
        for (file, inside) in [
            (format!("1:cpu:/docker/{A}\n"), true),
            (format!("1:cpu:/docker/{A}/init.scope\n"), true),
            (format!("0::/\n1:cpu:/docker/{A}\n"), true),
            (format!("1:cpu:/docker/{A}x\n"), false),
            (format!("1:cpu:/docker/{B}\n"), false),
            (format!("1:cpu:/user.slice/docker/{A}\n"), false),
            (format!("2:cpu:/docker/{A}\n"), false),
            ("1:cpu:/docker\n".to_owned(), false),
            (String::new(), false),
        ] {
            assert_eq!(
                Cgroups::parse(file.as_bytes()).are_in(&place),
                inside,
                "{file}"
            );
        }
    }

    #[test]
    fn lines_of_other_forms_are_left_out() {
        let long = format!("0::/{}\n", "a/".repeat(40_000));
        for bytes in [
            b"".as_slice(),
            b"\n\n",
            b"0",
            b"0:",
            b"0::",
            b"0::relative/docker",
            b"::::::",
            b"0::/\xff\xfe/docker",
            &[0; 4096],
            &[0xff; 4096],
            long.as_bytes(),
        ] {
            for lookup in [docker as Lookup, podman, kubernetes] {
                assert_eq!(Cgroups::parse(bytes).find(lookup).unwrap(), None);
            }
        }
        // What else stands in the file does no harm to a good line.
        let file = format!("0::/\u{fffd}\n\n:\n1:cpu:/docker/{A}\n");
        assert_eq!(id(&file, docker).as_deref(), Some(A));
        // A colon in the path is the path's.
        assert_eq!(split("0::/a:b:c"), Some(("0:", "/a:b:c")));
        assert_eq!(split("1:name=systemd:/x"), Some(("1:name=systemd", "/x")));
    }

    #[test]
    fn own_cgroups_can_be_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(!Cgroups::of(pid).unwrap().0.is_empty());
        assert!(Cgroups::of(i32::MAX).is_err());
    }

    #[test]
    fn fuzz_cgroups() {
        let pod = format!("kubepods-pod{}.slice", "0".repeat(32));
        let (scope, libpod, cri) = (
            format!("docker-{A}.scope"),
            format!("libpod-{B}"),
            format!("cri-containerd-{A}.scope"),
        );
        let pieces = [
            "/",
            "docker",
            A,
            B,
            &scope,
            &libpod,
            &pod,
            &cri,
            "..",
            ":",
            "\n",
            "0::/",
            "1:cpu:/",
            "x",
            "-",
            "app.slice",
            "kubepods",
            "libpod-payload-",
            "system.slice",
            "x.service",
            "\u{e9}",
            ".scope",
        ];
        let check = bolero::check!().with_type::<(Vec<u8>, Vec<u8>)>();
        check.for_each(|(choice, below)| {
            let written = |choice: &[u8]| -> String {
                let pieces = choice
                    .iter()
                    .map(|at| pieces[usize::from(*at) % pieces.len()]);
                pieces.collect()
            };
            let text = written(choice);
            for lookup in [docker as Lookup, podman, kubernetes] {
                let Ok(Some(place)) = Cgroups::parse(text.as_bytes()).find(lookup) else {
                    continue;
                };
                assert_eq!(place.id.len(), 64, "{text:?}");
                assert!(
                    place.id.bytes().all(|byte| byte.is_ascii_hexdigit()),
                    "{text:?}"
                );
                assert!(Cgroups::parse(text.as_bytes()).are_in(&place), "{text:?}");
                // A container makes what it likes below its level, and stays what it is.
                let line = format!("{}:{}", place.hierarchy, place.level);
                let deeper = format!("{line}/{}", written(below).replace('\n', ""));
                let found = Cgroups::parse(deeper.as_bytes()).find(lookup);
                assert_eq!(found.unwrap(), Some(place), "{deeper:?}");
            }
            let _noise = Cgroups::parse(choice);
        });
    }
}
