//! Issuer overrides: certificates of another hierarchy for the keys that sign X.509-SVIDs.
//!
//! An override changes the issuer's name and the chain that comes with an SVID, not the key, and not the
//! bundle that this cluster publishes: relying parties have the other hierarchy's root from elsewhere.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::crypto::x509::Certificate;
use crate::embedded::auth::Refusal;
use crate::embedded::ca::TlsAuthority;
use crate::embedded::store::Store;

/// The kind of the resource.
pub(in crate::embedded) const KIND: &str = "workload_identity_x509_issuer_override";
/// The one name that counts.
pub(in crate::embedded) const NAME: &str = "default";

/// What is wrong with a list of overrides; places count from zero.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(in crate::embedded) enum OverrideError {
    #[error("`overrides` is no list of mappings with `issuer` and `chain`")]
    Form,
    #[error("overrides[{0}].issuer is no DER certificate in base64")]
    Issuer(usize),
    #[error("overrides[{0}].issuer is no authority (basic constraints)")]
    NoAuthority(usize),
    #[error("overrides[{0}].chain[{1}] is no DER certificate in base64")]
    Link(usize, usize),
    #[error("overrides[{0}].chain does not begin with the issuer")]
    Begin(usize),
    #[error(
        "overrides[{0}].chain[{1}] is not signed by the next one, which has to be an authority"
    )]
    Order(usize, usize),
    #[error("overrides[{0}].chain ends in a self-signed root: relying parties have that")]
    Root(usize),
    #[error("overrides[{0}] is for the same key as another one")]
    Twice(usize),
}

/// One override.
#[derive(Debug, Clone)]
pub(in crate::embedded) struct Override {
    issuer: Certificate,
    /// What goes with each SVID, the issuer first (DER).
    chain: Vec<Vec<u8>>,
}

/// Reads and checks the `spec` of a resource.
///
/// # Errors
/// [`OverrideError`], the first one found.
pub(in crate::embedded) fn read(spec: &Value) -> Result<Vec<Override>, OverrideError> {
    let list = match spec.get("overrides") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(list) => list.as_array().ok_or(OverrideError::Form)?,
    };
    let mut overrides: Vec<Override> = Vec::new();
    for (at, one) in list.iter().enumerate() {
        let members = one.as_object().ok_or(OverrideError::Form)?;
        if members.keys().any(|key| key != "issuer" && key != "chain") {
            return Err(OverrideError::Form);
        }
        let issuer = members.get("issuer").and_then(certificate);
        let issuer = issuer.ok_or(OverrideError::Issuer(at))?;
        if !issuer.is_ca() {
            return Err(OverrideError::NoAuthority(at));
        }
        let known = |other: &Override| other.issuer.spki() == issuer.spki();
        if overrides.iter().any(known) {
            return Err(OverrideError::Twice(at));
        }
        let chain = match members.get("chain") {
            None | Some(Value::Null) => Vec::new(),
            Some(chain) => links(at, chain.as_array().ok_or(OverrideError::Form)?, &issuer)?,
        };
        overrides.push(Override { issuer, chain });
    }
    Ok(overrides)
}

fn links(at: usize, chain: &[Value], issuer: &Certificate) -> Result<Vec<Vec<u8>>, OverrideError> {
    let read = |(place, link)| certificate(link).ok_or(OverrideError::Link(at, place));
    let links: Vec<Certificate> = chain
        .iter()
        .enumerate()
        .map(read)
        .collect::<Result<_, _>>()?;
    let (Some(first), Some(last)) = (links.first(), links.last()) else {
        return Ok(Vec::new());
    };
    if first.der() != issuer.der() {
        return Err(OverrideError::Begin(at));
    }
    for (place, (link, next)) in links.iter().zip(links.iter().skip(1)).enumerate() {
        if !next.is_ca() || !link.is_signed_by(next) {
            return Err(OverrideError::Order(at, place));
        }
    }
    if last.is_signed_by(last) {
        return Err(OverrideError::Root(at));
    }
    Ok(links.iter().map(|link| link.der().to_vec()).collect())
}

fn certificate(base64: &Value) -> Option<Certificate> {
    let der = STANDARD.decode(base64.as_str()?).ok()?;
    Certificate::from_der(&der).ok()
}

/// Who issues in place of the cluster's own authority.
#[derive(Debug)]
pub(super) struct Instead {
    /// The same key under another name.
    pub(super) issuer: TlsAuthority,
    /// What goes with the SVID (DER).
    pub(super) chain: Vec<Vec<u8>>,
}

/// What is there in place of `signer`; `None` without overrides.
///
/// # Errors
/// There are overrides, and none is for this key: an SVID of another hierarchy than was asked for is
/// not made.
pub(super) fn instead_of(signer: &TlsAuthority, store: &Store) -> Result<Option<Instead>, Refusal> {
    let Some(resource) = store.get(KIND, NAME)? else {
        return Ok(None);
    };
    let unusable = |why: String| {
        tracing::error!(problem = why, "the {KIND} cannot be used");
        Refusal::unknown(format!(
            "the cluster's {KIND} {NAME:?} cannot be used: {why}"
        ))
    };
    let overrides = read(&resource.spec).map_err(|error| unusable(error.to_string()))?;
    if overrides.is_empty() {
        return Ok(None);
    }
    let spki = signer.key.public_spki();
    let found = overrides.into_iter().find(|one| one.issuer.spki() == spki);
    let found = found.ok_or_else(|| {
        unusable("none of its issuers is for the key that signs SVIDs now".to_owned())
    })?;
    let issuer = signer.certified_by(found.issuer.der());
    let issuer = issuer.map_err(|error| unusable(error.to_string()))?;
    Ok(Some(Instead {
        issuer,
        chain: found.chain,
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use x509_cert::ext::pkix::KeyUsages;

    use super::*;
    use crate::crypto::x509::COMMON_NAME;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::embedded::ca::AuthorityType;
    use crate::embedded::ca::mint::{self, Issuer, Subject, Template};
    use crate::embedded::resources::Mode;
    use crate::embedded::workload_identity::a_cluster;

    fn key() -> PrivateKey {
        PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
    }

    /// A certificate for `spki` by `issuer`.
    fn certify(name: &str, spki: &[u8], issuer: (&str, &PrivateKey), authority: bool) -> Vec<u8> {
        let subject = |name: &str| {
            let subject = Subject::default().one(COMMON_NAME, name).unwrap();
            subject.finish()
        };
        let now = std::time::UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        let template = Template {
            serial: mint::serial(),
            subject: subject(name),
            not_before: now,
            not_after: now + Duration::from_hours(1000),
            spki,
            key_usage: KeyUsages::KeyCertSign.into(),
            extended: &[],
            authority,
            names: Vec::new(),
        };
        let by = Issuer {
            name: &subject(issuer.0),
            key_id: None,
            key: issuer.1,
        };
        template.sign(by).unwrap()
    }

    fn text(der: &[u8]) -> String {
        STANDARD.encode(der)
    }

    #[test]
    fn lists_are_checked() {
        let (root, middle, own) = (key(), key(), key());
        let anchor = certify("root", &root.public_spki(), ("root", &root), true);
        let link = certify("middle", &middle.public_spki(), ("root", &root), true);
        let issuer = certify("issuer", &own.public_spki(), ("middle", &middle), true);
        let leaf = certify("issuer", &own.public_spki(), ("middle", &middle), false);
        let [anchor, link, issuer, leaf] = [anchor, link, issuer, leaf].map(|der| text(&der));
        let checked =
            |overrides: &Value| read(&json!({ "overrides": overrides })).map(|all| all.len());
        let one = |chain: &[&String]| json!([{ "issuer": issuer, "chain": chain }]);
        assert_eq!(read(&json!({})).map(|all| all.len()), Ok(0));
        assert_eq!(checked(&json!([{ "issuer": issuer }])), Ok(1));
        assert_eq!(checked(&one(&[&issuer])), Ok(1));
        assert_eq!(checked(&one(&[&issuer, &link])), Ok(1));
        let junk = "junk".to_owned();
        for (overrides, problem) in [
            (json!("x"), OverrideError::Form),
            (json!(["x"]), OverrideError::Form),
            (
                json!([{ "issuer": issuer, "chains": [] }]),
                OverrideError::Form,
            ),
            (
                json!([{ "issuer": issuer, "chain": "x" }]),
                OverrideError::Form,
            ),
            (json!([{}]), OverrideError::Issuer(0)),
            (json!([{ "issuer": junk }]), OverrideError::Issuer(0)),
            (json!([{ "issuer": leaf }]), OverrideError::NoAuthority(0)),
            (one(&[&issuer, &junk]), OverrideError::Link(0, 1)),
            (one(&[&link]), OverrideError::Begin(0)),
            (one(&[&issuer, &anchor]), OverrideError::Order(0, 0)),
            (one(&[&issuer, &link, &anchor]), OverrideError::Root(0)),
            (
                json!([{ "issuer": issuer }, { "issuer": issuer }]),
                OverrideError::Twice(1),
            ),
        ] {
            assert_eq!(checked(&overrides), Err(problem), "{overrides}");
        }
    }

    #[test]
    fn the_override_of_the_signing_key_issues() {
        let state = a_cluster();
        let authority = state.authorities.get(AuthorityType::Spiffe);
        let signer = authority.signer().unwrap();
        assert!(instead_of(signer, &state.store).unwrap().is_none());
        let create = |ders: &[&Vec<u8>]| {
            let overrides: Vec<Value> = ders
                .iter()
                .map(|der| json!({ "issuer": text(der), "chain": [text(der)] }))
                .collect();
            let resource = json!({
                "kind": KIND, "version": "v1", "metadata": { "name": NAME },
                "spec": { "overrides": overrides },
            });
            let files = [("f".to_owned(), resource.to_string())];
            state.create(&files, Mode::Force, "test").unwrap();
        };
        let root = key();
        let ours = certify("ours", &signer.key.public_spki(), ("root", &root), true);
        let other = certify("other", &key().public_spki(), ("root", &root), true);
        create(&[]);
        assert!(instead_of(signer, &state.store).unwrap().is_none());
        create(&[&other, &ours]);
        let Instead { issuer, chain } = instead_of(signer, &state.store).unwrap().unwrap();
        assert_eq!(chain, std::slice::from_ref(&ours));
        assert_eq!(issuer.key.public_spki(), signer.key.public_spki());
        let ours = Certificate::from_der(&ours).unwrap();
        assert_eq!(issuer.not_after, ours.not_after());
        create(&[&other]);
        let refusal = instead_of(signer, &state.store).unwrap_err();
        assert!(
            refusal.to_string().contains("none of its issuers"),
            "{refusal}"
        );
    }
}
