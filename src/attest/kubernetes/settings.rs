//! How the kubelet is reached.

use std::path::PathBuf;

use crate::yaml::{Fields, Tree};

/// The kubelet's port with TLS, unless configured.
const SECURE_PORT: u16 = 10250;
/// Where Kubernetes puts a pod's token and the cluster's authority.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The `kubelet` section as it was configured; absent keys have their defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings {
    read_only_port: Option<u16>,
    secure_port: Option<u16>,
    token_path: Option<String>,
    ca_path: Option<String>,
    skip_verify: bool,
    anonymous: bool,
    certificate_path: Option<String>,
    private_key_path: Option<String>,
}

/// The kubelet's port, and how it is spoken to there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    /// Plain HTTP, to whoever asks.
    ReadOnly(u16),
    /// TLS.
    Secure(u16),
}

impl Port {
    pub(super) fn number(self) -> u16 {
        match self {
            Self::ReadOnly(port) | Self::Secure(port) => port,
        }
    }
}

impl Settings {
    /// Reads the section; `None` if it has problems, which were reported.
    pub(super) fn parse(section: Option<Fields<'_>>) -> Option<Self> {
        let Some(mut fields) = section else {
            return Some(Self::default());
        };
        let mut sound = true;
        let mut port = |fields: &mut Fields<'_>, key: &str| {
            // Zero is how Go writes a port that is not set.
            let number = fields.integer(key).filter(|number| *number != 0)?;
            let port = u16::try_from(number).ok();
            if port.is_none() {
                fields.error(key, format!("{number} is no port"), Some("from 1 to 65535"));
                sound = false;
            }
            port
        };
        let read_only_port = port(&mut fields, "read_only_port");
        let secure_port = port(&mut fields, "secure_port");
        if read_only_port.is_some() && secure_port.is_some() {
            fields.error(
                "read_only_port",
                "the kubelet is asked on one port, not on both",
                Some("remove `read_only_port` or `secure_port`"),
            );
            sound = false;
        }
        let settings = Self {
            read_only_port,
            secure_port,
            token_path: fields.string("token_path"),
            ca_path: fields.string("ca_path"),
            skip_verify: fields.bool("skip_verify").unwrap_or(false),
            anonymous: fields.bool("anonymous").unwrap_or(false),
            certificate_path: fields.string("certificate_path"),
            private_key_path: fields.string("private_key_path"),
        };
        if let Some((key, problem)) = settings.contradiction() {
            let remedy = "set `certificate_path` with `private_key_path`, or `token_path`, or \
                          `anonymous`";
            fields.error(key, problem, Some(remedy));
            sound = false;
        }
        fields.finish();
        sound.then_some(settings)
    }

    pub(super) fn port(&self) -> Port {
        match self.read_only_port {
            Some(port) => Port::ReadOnly(port),
            None => Port::Secure(self.secure_port.unwrap_or(SECURE_PORT)),
        }
    }

    /// What does not go together in who the agent says it is: a key, and why.
    fn contradiction(&self) -> Option<(&'static str, &'static str)> {
        let (certificate, key) = (&self.certificate_path, &self.private_key_path);
        match (certificate, key) {
            (None, None) => None,
            (Some(_), None) => Some(("certificate_path", "its private key is missing")),
            (None, Some(_)) => Some(("private_key_path", "its certificate is missing")),
            _ if self.anonymous => Some(("anonymous", "a certificate is not anonymous")),
            _ if self.token_path.is_some() => {
                Some(("token_path", "a certificate stands in for a token"))
            }
            _ if self.read_only_port.is_some() => Some((
                "read_only_port",
                "a port without TLS asks for no certificate",
            )),
            _ => None,
        }
    }

    /// Where the client's certificate and its key are; `None` without one.
    pub(super) fn certificate(&self) -> Option<(PathBuf, PathBuf)> {
        let certificate = self.certificate_path.as_ref()?;
        Some((certificate.into(), self.private_key_path.as_ref()?.into()))
    }

    /// Where the token is; `None` for questions without one.
    pub(super) fn token(&self) -> Option<PathBuf> {
        let secret = !self.anonymous
            && self.certificate_path.is_none()
            && matches!(self.port(), Port::Secure(_));
        secret.then(|| path(self.token_path.as_deref(), "token"))
    }

    /// Where the authority of the kubelet's certificate is; `None` if anybody is believed.
    pub(super) fn authority(&self) -> Option<PathBuf> {
        (!self.skip_verify).then(|| path(self.ca_path.as_deref(), "ca.crt"))
    }

    /// The attestor's section.
    pub(super) fn emit(&self) -> Tree {
        let number = |port: Option<u16>| port.map(|port| Tree::Raw(port.to_string()));
        let flag = |flag: bool| flag.then_some(Tree::Bool(true));
        let kubelet = [
            ("read_only_port", number(self.read_only_port)),
            ("secure_port", number(self.secure_port)),
            ("token_path", self.token_path.as_ref().map(Tree::text)),
            ("ca_path", self.ca_path.as_ref().map(Tree::text)),
            ("skip_verify", flag(self.skip_verify)),
            ("anonymous", flag(self.anonymous)),
            (
                "certificate_path",
                self.certificate_path.as_ref().map(Tree::text),
            ),
            (
                "private_key_path",
                self.private_key_path.as_ref().map(Tree::text),
            ),
        ];
        let kubelet = (*self != Self::default()).then(|| Tree::map(kubelet));
        Tree::map([("enabled", Some(Tree::Bool(true))), ("kubelet", kubelet)])
    }
}

fn path(configured: Option<&str>, default: &str) -> PathBuf {
    match configured {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(SERVICE_ACCOUNT).join(default),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Settings>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let settings = Settings::parse(fields.section("kubelet"));
        fields.finish();
        (settings, problems.render("t"))
    }

    #[test]
    fn defaults_are_those_of_a_pod() {
        for source in ["{}", "kubelet:\n", "kubelet: {read_only_port: 0}"] {
            let settings = read(source).0.unwrap();
            assert_eq!(settings.port(), Port::Secure(10250));
            let file = |name: &str| Some(PathBuf::from(SERVICE_ACCOUNT).join(name));
            assert_eq!(settings.token(), file("token"));
            assert_eq!(settings.authority(), file("ca.crt"));
            assert_eq!(emit::emit(&settings.emit()), "enabled: true\n");
        }
    }

    #[test]
    fn what_is_configured_counts_and_reads_back() {
        let source = "kubelet:\n  secure_port: 1\n  token_path: /t\n  ca_path: /c\n  \
            skip_verify: true\n  anonymous: true\n";
        let (settings, problems) = read(source);
        assert_eq!(problems, "");
        let settings = settings.unwrap();
        assert_eq!(settings.port(), Port::Secure(1));
        assert_eq!((settings.token(), settings.authority()), (None, None));
        let text = emit::emit(&settings.emit());
        assert_eq!(
            read(&text.replace("enabled: true\n", "")).0.unwrap(),
            settings
        );

        let source = "kubelet:\n  certificate_path: /c\n  private_key_path: /k\n";
        let settings = read(source).0.unwrap();
        assert_eq!(settings.token(), None, "one of both is enough");
        let files = ("/c".into(), "/k".into());
        assert_eq!(settings.certificate(), Some(files));
        assert!(emit::emit(&settings.emit()).contains("private_key_path: /k"));

        let settings = read("kubelet: {read_only_port: 10255}").0.unwrap();
        assert_eq!(settings.port(), Port::ReadOnly(10255));
        assert_eq!(settings.token(), None, "a secret is not sent in clear");
    }

    #[test]
    fn problems_are_told() {
        for (source, expected) in [
            (
                "kubelet: {read_only_port: 1, secure_port: 2}",
                "kubelet.read_only_port: the kubelet is asked on one port",
            ),
            (
                "kubelet: {certificate_path: /c}",
                "kubelet.certificate_path: its private key is missing",
            ),
            (
                "kubelet: {private_key_path: /k}",
                "kubelet.private_key_path: its certificate is missing",
            ),
            (
                "kubelet: {certificate_path: /c, private_key_path: /k, anonymous: true}",
                "kubelet.anonymous: a certificate is not anonymous",
            ),
            (
                "kubelet: {certificate_path: /c, private_key_path: /k, token_path: /t}",
                "kubelet.token_path: a certificate stands in for a token",
            ),
            (
                "kubelet: {certificate_path: /c, private_key_path: /k, read_only_port: 1}",
                "kubelet.read_only_port: a port without TLS",
            ),
            ("kubelet: {secure_port: 65536}", "65536 is no port"),
            ("kubelet: {secure_port: -1}", "-1 is no port"),
        ] {
            let (settings, problems) = read(source);
            assert_eq!(settings, None, "{source}");
            assert!(problems.contains(expected), "{problems}");
        }
    }
}
