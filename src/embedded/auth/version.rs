//! The version that a client says it speaks (metadata `version`): too old ones are turned away.

use std::cmp::Ordering;

use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};

use crate::embedded::MIN_CLIENT_VERSION;

/// A service that only clients of a supported version can call.
pub(in crate::embedded) type Checked<S> =
    InterceptedService<S, fn(Request<()>) -> Result<Request<()>, Status>>;

/// Puts the check of versions in front of `service`.
pub(in crate::embedded) fn checked<S>(service: S) -> Checked<S> {
    InterceptedService::new(service, check)
}

/// Refuses clients older than [`MIN_CLIENT_VERSION`]. None, or more than one, is no statement.
fn check(request: Request<()>) -> Result<Request<()>, Status> {
    let mut versions = request.metadata().get_all("version").iter();
    let (Some(version), None) = (versions.next(), versions.next()) else {
        return Ok(request);
    };
    let supported = version.to_str().is_ok_and(is_supported);
    if supported {
        Ok(request)
    } else {
        Err(Status::permission_denied(format!(
            "client version is unsupported, minimum supported version is {MIN_CLIENT_VERSION}"
        )))
    }
}

fn is_supported(version: &str) -> bool {
    match (parse(version), parse(MIN_CLIENT_VERSION)) {
        (Some(given), Some(least)) => compare(&given, &least) != Ordering::Less,
        _ => false,
    }
}

type Version<'a> = ([u64; 3], &'a str);

/// The numbers and the pre-release of a semantic version; build metadata is dropped.
fn parse(text: &str) -> Option<Version<'_>> {
    let text = text.split_once('+').map_or(text, |(version, _)| version);
    let (core, pre) = match text.split_once('-') {
        Some((_, "")) => return None,
        Some((core, pre)) => (core, pre),
        None => (text, ""),
    };
    let mut numbers = core.split('.').map(|part| {
        let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten()
    });
    let core = [numbers.next()??, numbers.next()??, numbers.next()??];
    numbers.next().is_none().then_some((core, pre))
}

/// Precedence of semantic versions (semver.org, section 11).
fn compare(one: &Version<'_>, other: &Version<'_>) -> Ordering {
    one.0.cmp(&other.0).then_with(|| match (one.1, other.1) {
        ("", "") => Ordering::Equal,
        ("", _) => Ordering::Greater,
        (_, "") => Ordering::Less,
        (one, other) => pre_release(one).cmp(pre_release(other)),
    })
}

/// Numbers sort by value and before words; words sort by their bytes.
fn pre_release(text: &str) -> impl Iterator<Item = (bool, u64, &str)> {
    text.split('.').map(|part| match part.parse::<u64>() {
        Ok(number) => (false, number, ""),
        Err(_) => (true, 0, part),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_before_passes_with_its_pre_releases() {
        for good in [
            "18.0.0",
            "17.0.0",
            "17.0.0-aa",
            "17.0.0-alpha.1",
            "17.0.0-dev",
            "19.1.2+x",
        ] {
            assert!(is_supported(good), "{good}");
        }
        for bad in [
            "16.9.9", "17.0.0-a", "17.0.0-1", "0.1.0", "", "18", "18.0", "v18.0.0", "18.0.0-",
        ] {
            assert!(!is_supported(bad), "{bad}");
        }
    }

    #[test]
    fn only_a_single_statement_counts() {
        let with = |versions: &[&str]| {
            let mut request = Request::new(());
            for version in versions {
                request
                    .metadata_mut()
                    .append("version", version.parse().unwrap());
            }
            check(request).map_err(|status| status.code())
        };
        assert!(with(&[]).is_ok());
        assert!(with(&["18.0.0"]).is_ok());
        assert_eq!(with(&["0.1.0"]).unwrap_err(), tonic::Code::PermissionDenied);
        assert!(with(&["0.1.0", "0.1.0"]).is_ok());
    }
}
