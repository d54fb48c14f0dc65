//! `join_uri`: address, join method and token in one line,
//! `tbot+<proxy|auth>+<join-method>://<token>[:<parameter>]@<host:port>`.

use crate::yaml::Fields;

use super::onboarding;
use super::plan::{Onboarding, Server};
use crate::destination::unescape;
use crate::join::TokenSource;
use crate::secret::Secret;

/// How to write one, for hints.
const FORM: &str = "tbot+<proxy|auth>+<join-method>://<token>@<host:port>";

/// The parts of a URI. The token and the parameter may be secrets.
struct Parts {
    proxy: bool,
    method: String,
    token: String,
    parameter: Option<Secret<String>>,
    address: String,
}

/// Fills in what the URI says. It never overrides: whatever is already set conflicts, and all
/// conflicts are reported.
pub(super) fn apply(
    fields: &mut Fields<'_>,
    server: &mut Option<Server>,
    onboarding: &mut Onboarding,
) {
    const KEY: &str = "join_uri";
    let Some(uri) = fields.string(KEY) else {
        return;
    };
    let parts = match split(&uri) {
        Ok(parts) => parts,
        Err(problem) => {
            fields.error(KEY, problem, Some(&format!("write {FORM}")));
            return;
        }
    };
    let taken = [
        (server.is_some(), "the cluster's address"),
        (onboarding.method.is_some(), "the join method"),
        (onboarding.token.is_some(), "the token"),
    ];
    for (set, what) in taken {
        if set {
            fields.error(
                KEY,
                format!("{what} is in `join_uri` and also set elsewhere"),
                Some("keep one of them"),
            );
        }
    }
    *server = Some(if parts.proxy {
        Server::Proxy(parts.address)
    } else {
        Server::Auth(parts.address)
    });
    onboarding.method = onboarding::method(fields, KEY, &parts.method).map(|method| {
        let Some(parameter) = parts.parameter else {
            return method.read(None);
        };
        method.with_parameter(parameter).unwrap_or_else(|| {
            fields.error(
                KEY,
                format!(
                    "join method {} takes no parameter after the token",
                    method.name()
                ),
                Some(&format!("write {FORM}")),
            );
            method.read(None)
        })
    });
    onboarding.token = Some(TokenSource::new(parts.token));
}

fn split(uri: &str) -> Result<Parts, String> {
    let (scheme, rest) = uri.split_once("://").ok_or("it has no scheme")?;
    let words: Vec<&str> = scheme.split('+').collect();
    let [program, target, method] = words.as_slice() else {
        return Err("its scheme has not three parts".to_owned());
    };
    if *program != "tbot" {
        return Err("its scheme does not begin with `tbot+`".to_owned());
    }
    let proxy = match *target {
        "proxy" => true,
        "auth" => false,
        _ => return Err("the second part of its scheme is neither `proxy` nor `auth`".to_owned()),
    };
    let (user, address) = rest.rsplit_once('@').ok_or("it has no token before `@`")?;
    let (token, parameter) = match user.split_once(':') {
        Some((token, parameter)) => (token, Some(parameter)),
        None => (user, None),
    };
    let token = unescape(token).ok_or("its token is not URL-encoded text")?;
    if token.is_empty() {
        return Err("it has no token before `@`".to_owned());
    }
    let parameter = match parameter.filter(|parameter| !parameter.is_empty()) {
        Some(parameter) => {
            let parameter = unescape(parameter);
            Some(Secret::new(
                parameter.ok_or("its parameter is not URL-encoded text")?,
            ))
        }
        None => None,
    };
    let address = address.trim_end_matches('/');
    if !super::root::is_host_port(address) {
        return Err("its address is not host:port".to_owned());
    }
    Ok(Parts {
        proxy,
        method: method_name(method),
        token,
        parameter,
        address: address.to_owned(),
    })
}

/// URI schemes have no underscore, so the names of methods that do are written in two other ways.
fn method_name(scheme: &str) -> String {
    match scheme {
        "boundkeypair" | "bound-keypair" => "bound_keypair",
        "azuredevops" | "azure-devops" => "azure_devops",
        "terraformcloud" | "terraform-cloud" => "terraform_cloud",
        "genericoidc" | "generic-oidc" => "generic_oidc",
        other => other,
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        let parts = split("tbot+proxy+bound-keypair://a%3Ab:secret@example.com:443").unwrap();
        assert!(parts.proxy && parts.parameter.is_some());
        assert_eq!(parts.method, "bound_keypair");
        assert_eq!(parts.token, "a:b");
        assert_eq!(parts.address, "example.com:443");
        assert!(!split("tbot+auth+iam://t@[::1]:3025/").unwrap().proxy);
    }

    #[test]
    fn refused() {
        for uri in [
            "",
            "tbot+proxy+iam",
            "https://t@example.com:443",
            "tbot+proxy://t@example.com:443",
            "tbot+leaf+iam://t@example.com:443",
            "tsh+proxy+iam://t@example.com:443",
            "tbot+proxy+iam://example.com:443",
            "tbot+proxy+iam://@example.com:443",
            "tbot+proxy+iam://t@example.com",
            "tbot+proxy+iam://%zz@example.com:443",
            "tbot+proxy+iam://%f@example.com:443",
        ] {
            assert!(split(uri).is_err(), "{uri}");
        }
    }
}
