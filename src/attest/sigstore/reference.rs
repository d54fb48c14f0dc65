//! Names of images, as Docker reads them.

/// The registry of names without one.
const DOCKER_HUB: &str = "index.docker.io";

/// Where an image is: a registry and a repository in it. Tags say nothing about the image that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reference {
    /// `host` or `host:port`.
    pub(super) registry: String,
    pub(super) repository: String,
}

impl Reference {
    /// Reads `[registry/]repository[:tag][@digest]`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let name = match text.split_once('@') {
            Some((name, digest)) if is_kind_of_digest(digest) => name,
            Some(_) => return None,
            None => text,
        };
        let path = name.rfind('/').map_or(0, |at| at + 1);
        let end = name
            .get(path..)?
            .find(':')
            .map_or(name.len(), |at| path + at);
        // An image without a name is called by its ID.
        if end > 0 && name.get(..end)? == "sha256" {
            return None;
        }
        let name = name.get(..end)?;
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
                (first, rest.to_owned())
            }
            Some(_) => (DOCKER_HUB, name.to_owned()),
            None => (DOCKER_HUB, format!("library/{name}")),
        };
        let registry = if registry == "docker.io" {
            DOCKER_HUB
        } else {
            registry
        };
        (is_host(registry) && is_repository(&repository)).then(|| Self {
            registry: registry.to_owned(),
            repository,
        })
    }
}

/// Whether this is `host` or `host:port` as it stands in the name of an image.
pub(super) fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let inner = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let named = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            host.len() <= 253
                && host.split('.').all(|label| {
                    !label.is_empty()
                        && !label.starts_with('-')
                        && !label.ends_with('-')
                        && label
                            .bytes()
                            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                })
        }
    };
    named && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn is_repository(text: &str) -> bool {
    (2..=255).contains(&text.len())
        && text.split('/').all(|part| {
            let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            part.bytes().next().is_some_and(inner)
                && part.bytes().all(|b| inner(b) || b"._-".contains(&b))
                && !part.contains("..")
        })
}

/// Whether this is an algorithm and a value, whatever they are.
fn is_kind_of_digest(text: &str) -> bool {
    text.split_once(':').is_some_and(|(algorithm, value)| {
        [algorithm, value]
            .iter()
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
    })
}

/// Whether this is `sha256:` and 64 lower-case hex digits.
pub(super) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        for (text, registry, repository) in [
            ("nginx", DOCKER_HUB, "library/nginx"),
            ("nginx:1.27", DOCKER_HUB, "library/nginx"),
            ("grafana/tempo:2", DOCKER_HUB, "grafana/tempo"),
            (
                "docker.io/library/nginx@sha256:00",
                DOCKER_HUB,
                "library/nginx",
            ),
            ("localhost/x1:1", "localhost", "x1"),
            ("localhost:5000/a/b-c", "localhost:5000", "a/b-c"),
            (
                "registry.example.org:5000/a/b:t@sha256:00",
                "registry.example.org:5000",
                "a/b",
            ),
            ("[::1]:5000/a1", "[::1]:5000", "a1"),
            ("127.0.0.1:5000/a1", "127.0.0.1:5000", "a1"),
        ] {
            let read = Reference::parse(text);
            let expected = Reference {
                registry: registry.to_owned(),
                repository: repository.to_owned(),
            };
            assert_eq!(read, Some(expected), "{text}");
        }
    }

    #[test]
    fn what_names_no_image_is_refused() {
        for text in [
            "",
            "sha256:4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6",
            "@sha256:00",
            ":1",
            "a b",
            "UPPER/case",
            "example.org/",
            "example.org/../../x",
            "example.org/a/../b",
            "example.org/a?b=c",
            "example.org/a#b",
            "example.org/a%2f",
            "exa mple.org/a1",
            "example.org:0/a1",
            "example.org:99999/a1",
            "-x.org/a1",
            "user@example.org/a1",
            "a1@sha256",
            "a1@sha256:00@sha256:00",
        ] {
            assert_eq!(Reference::parse(text), None, "{text}");
        }
    }

    #[test]
    fn fuzz_names_of_images() {
        const PIECES: &[&str] = &[
            "docker.io",
            "library",
            "registry.example.org",
            "localhost",
            "[::1]",
            "127.0.0.1",
            "sha256",
            "4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6",
            "a1",
            ":5000",
            "/",
            "/",
            ":",
            "@",
            "..",
            "-",
            "?",
            "#",
            "%2f",
            "UP",
            " ",
            "\r\n",
            "\u{e9}",
        ];
        bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
            let pick = |at: &u8| PIECES[usize::from(*at) % PIECES.len()];
            let text: String = choice.iter().take(24).map(pick).collect();
            let Some(image) = Reference::parse(&text) else {
                return;
            };
            // Both become parts of addresses, where they must mean nothing else.
            let address = format!("https://{}/v2/{}/tags", image.registry, image.repository);
            let address: http::Uri = address.parse().unwrap();
            assert_eq!(address.authority().unwrap().as_str(), image.registry);
            assert_eq!(address.path(), format!("/v2/{}/tags", image.repository));
            assert_eq!(address.query(), None);
            assert!(!address.path().contains("/../"), "{text}");
            // What was read is read again as the same.
            let again = format!("{}/{}", image.registry, image.repository);
            assert_eq!(Reference::parse(&again), Some(image), "{text}");
        });
    }

    #[test]
    fn digests_are_told_from_tags() {
        let hex = "4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6";
        assert!(is_digest(&format!("sha256:{hex}")));
        for text in [
            "",
            "sha256:",
            hex,
            &format!("sha256:{hex}0"),
            &format!("sha512:{hex}"),
        ] {
            assert!(!is_digest(text), "{text}");
        }
    }
}
