//! What a machine sends, with mistakes in it.

use http::Uri;

use super::*;
use crate::join::azure::verify::machine::{listed, next_page, of_claims};
use crate::join::tests::mutilated::{Edit, mutilated};

/// Two documents of different machines would be a better forgery than any octet.
fn spliced(one: &[u8], other: &[u8], at: usize) -> Vec<u8> {
    let at = at % one.len().min(other.len());
    [&one[..at], &other[at..]].concat()
}

fn signature(document: &str) -> Vec<u8> {
    let json: Value = serde_json::from_str(document).unwrap();
    STANDARD
        .decode(json["signature"].as_str().unwrap())
        .unwrap()
}

#[test]
fn fuzz_attested_documents() {
    let real = verify(ATTRS).unwrap();
    let samples = [ATTRS, PLAIN, OTHER].map(signature);
    let (issuers, root) = (issuers(), root());
    let check = bolero::check!().with_type::<(u8, u16, Vec<Edit>)>();
    check.for_each(|(choice, at, edits)| {
        let pick = |at: u8| &samples[usize::from(at) % samples.len()];
        let document = if choice % 4 == 0 {
            mutilated(ATTRS.as_bytes(), edits)
        } else {
            let mut der = pick(choice >> 2).clone();
            if choice % 4 == 1 {
                der = spliced(&der, pick(choice >> 4), usize::from(*at));
            }
            let der = mutilated(&der, edits);
            json!({"encoding": "pkcs7", "signature": STANDARD.encode(der)})
                .to_string()
                .into_bytes()
        };
        let Ok(document) = Document::read(&document) else {
            return;
        };
        if let Some(path) = issuer_path(document.signer()) {
            assert!(path.starts_with("/pkiops/certs/") && !path.contains("/../"));
        }
        if let Ok(attested) = document.verify(CHALLENGE, &issuers, &root, now()) {
            assert_eq!(attested, real);
        }
        let elsewhere = document.verify("another", &issuers, &root, now());
        assert!(elsewhere.is_err());
    });
}

#[test]
fn fuzz_intermediate_certificates() {
    let sample = issuers().concat();
    let document = Document::read(ATTRS.as_bytes()).unwrap();
    let (real, root) = (verify(ATTRS).unwrap(), root());
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let bytes = mutilated(&sample, edits);
        let Some(parts) = split(&bytes) else { return };
        assert_eq!(parts.concat(), bytes);
        let parts: Vec<Vec<u8>> = parts.into_iter().map(<[u8]>::to_vec).collect();
        if let Ok(attested) = document.verify(CHALLENGE, &parts, &root, now()) {
            assert_eq!(attested, real);
        }
    });
}

#[test]
fn fuzz_what_azure_says_of_machines() {
    const ID: &str =
        "/subscriptions/S/resourceGroups/G/providers/Microsoft.Compute/virtualMachines/vm";
    let page = json!({
        "value": [{"id": "x", "properties": {"vmId": "other"}}, {"id": ID, "properties": {"vmId": "me"}}],
        "nextLink": "https://management.azure.com/subscriptions/S?page=2",
    })
    .to_string();
    bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
        let bytes = mutilated(page.as_bytes(), edits);
        let id = String::from_utf8_lossy(&mutilated(ID.as_bytes(), edits)).into_owned();
        let claims = json!({"xms_mirid": id});
        let page: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let listed = listed(&page, "me").and_then(Result::ok);
        if listed.is_some() {
            let machines = page["value"].as_array().unwrap();
            let mut ids = machines.iter().map(|it| &it["properties"]["vmId"]);
            assert!(ids.any(|id| id.as_str().unwrap_or_default().eq_ignore_ascii_case("me")));
        }
        for place in listed
            .into_iter()
            .chain(of_claims(claims.as_object().unwrap()))
        {
            for part in [place.subscription, place.resource_group] {
                assert!(!part.is_empty() && !part.contains('/'), "{part:?}");
            }
        }
        if let Some(Ok(uri)) = next_page(&page).map(|path| {
            let whole = format!("https://management.azure.com{path}");
            assert_eq!(page["nextLink"], whole);
            whole.parse::<Uri>()
        }) {
            assert_eq!(uri.host(), Some("management.azure.com"));
            assert_eq!(uri.port(), None);
        }
    });
}
