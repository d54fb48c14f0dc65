//! Names of AWS resources.

/// The parts of an ARN that are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Arn<'a> {
    pub(super) service: &'a str,
    pub(super) region: &'a str,
    pub(super) resource: &'a str,
}

impl<'a> Arn<'a> {
    /// Reads `arn:<partition>:<service>:<region>:<account>:<resource>`.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.splitn(6, ':');
        let (prefix, partition, service) = (parts.next()?, parts.next()?, parts.next()?);
        let (region, _account, resource) = (parts.next()?, parts.next()?, parts.next()?);
        let plain = text.bytes().all(|b| b.is_ascii_graphic());
        let sound = prefix == "arn"
            && plain
            && [partition, service, resource]
                .iter()
                .all(|part| !part.is_empty());
        sound.then_some(Self {
            service,
            region,
            resource,
        })
    }
}

/// Whether AWS could have a region of this name: it becomes part of a host name.
pub(super) fn is_region(name: &str) -> bool {
    name.len() <= 32
        && name.split('-').count() >= 3
        && name.split('-').all(|part| !part.is_empty())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        assert_eq!(
            Arn::parse("arn:aws:iam::1:role/a:b"),
            Some(Arn {
                service: "iam",
                region: "",
                resource: "role/a:b"
            })
        );
        for bad in [
            "",
            "r",
            "arn:aws:iam::1",
            "arn::iam::1:role/x",
            "arn:aws:iam::1:",
            "urn:aws:iam::1:x",
            "arn:aws:iam::1:role/a b",
        ] {
            assert_eq!(Arn::parse(bad), None, "{bad}");
        }
        for good in ["us-east-1", "us-gov-west-1", "cn-north-1", "us-iso-east-1"] {
            assert!(is_region(good), "{good}");
        }
        for bad in [
            "",
            "us",
            "us-east",
            "us-east-1.evil.example/",
            "US-EAST-1",
            "us--1",
            "a-b-",
        ] {
            assert!(!is_region(bad), "{bad}");
        }
    }
}
