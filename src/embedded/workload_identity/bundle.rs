//! What the world may know of the SPIFFE authority: its trust bundle, and its JWT keys for OIDC.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use der::Decode as _;
use der::asn1::UintRef;
use serde_json::{Map, Value, json};
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::issue::{key_id, rsa_public_key};
use crate::crypto::x509::Certificate;
use crate::embedded::ca::Authority;

/// Where the bundle is served.
pub const BUNDLE_PATH: &str = "/webapi/spiffe/bundle.json";
/// Where the OIDC discovery document is served.
pub const DISCOVERY_PATH: &str = "/workload-identity/.well-known/openid-configuration";
/// Where the JWT keys are served.
pub const KEYS_PATH: &str = "/workload-identity/jwt-jwks.json";
/// How often readers of the bundle should come back, in seconds.
const REFRESH: u32 = 300;

/// The issuer of JWT-SVIDs, for a public address `host[:port]`; port 443 is left out.
#[must_use]
pub fn issuer(public_addr: &str) -> String {
    let address = public_addr.strip_suffix(":443").unwrap_or(public_addr);
    format!("https://{address}/workload-identity")
}

/// The SPIFFE bundle of the trust domain.
///
/// `spiffe_sequence` grows with every step of a rotation: with the time of the step, and with each
/// key that goes.
#[must_use]
pub fn spiffe_bundle(authority: &Authority) -> Value {
    let milliseconds = |time: std::time::SystemTime| {
        let since = time.duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or_default()
        })
    };
    let mut keys = Vec::new();
    let mut newest = authority.changed.map_or(0, milliseconds);
    for tls in authority.trusted_tls() {
        let Ok(certificate) = Certificate::from_der(&tls.certificate) else {
            continue;
        };
        newest = newest.max(milliseconds(certificate.not_before()));
        let mut key = Map::new();
        key.insert("use".to_owned(), json!("x509-svid"));
        key.extend(public_key(&certificate.spki()));
        key.insert("x5c".to_owned(), json!([STANDARD.encode(&tls.certificate)]));
        keys.push(Value::Object(key));
    }
    for spki in jwt_keys(authority) {
        let mut key = Map::new();
        key.insert("use".to_owned(), json!("jwt-svid"));
        key.extend(public_key(&spki));
        key.insert("kid".to_owned(), json!(key_id(&spki)));
        keys.push(Value::Object(key));
    }
    let count = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    let sequence = (newest << 8) + u64::from(u8::MAX - count);
    json!({
        "keys": keys,
        "spiffe_refresh_hint": REFRESH,
        "spiffe_sequence": sequence,
    })
}

/// The OIDC discovery document for the cluster at `public_addr`.
#[must_use]
pub fn openid_configuration(public_addr: &str) -> Value {
    let issuer = issuer(public_addr);
    json!({
        "issuer": issuer,
        "jwks_uri": format!("{issuer}/jwt-jwks.json"),
        "claims": ["iss", "sub", "jti", "aud", "exp", "iat"],
        "id_token_signing_alg_values_supported": ["RS256"],
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
    })
}

/// The JWT keys of the authority for OIDC relying parties.
#[must_use]
pub fn jwks(authority: &Authority) -> Value {
    let keys: Vec<Value> = jwt_keys(authority)
        .map(|spki| {
            let mut key = public_key(&spki);
            key.insert("alg".to_owned(), json!("RS256"));
            key.insert("use".to_owned(), json!("sig"));
            key.insert("kid".to_owned(), json!(key_id(&spki)));
            Value::Object(key)
        })
        .collect();
    json!({ "keys": keys })
}

fn jwt_keys(authority: &Authority) -> impl Iterator<Item = Vec<u8>> {
    let keys = authority.active.jwt.iter().chain(&authority.additional.jwt);
    keys.map(crate::crypto::PrivateKey::public_spki)
}

/// The members of a JWK that describe a public key: RSA or P-256, nothing for others.
fn public_key(spki: &[u8]) -> Map<String, Value> {
    #[derive(der::Sequence)]
    struct RsaPublicKey<'a> {
        modulus: UintRef<'a>,
        exponent: UintRef<'a>,
    }
    let text = |bytes: &[u8]| json!(URL_SAFE_NO_PAD.encode(bytes));
    if let Some(pkcs1) = rsa_public_key(spki)
        && let Ok(key) = RsaPublicKey::from_der(&pkcs1)
    {
        return Map::from_iter([
            ("kty".to_owned(), json!("RSA")),
            ("n".to_owned(), text(key.modulus.as_bytes())),
            ("e".to_owned(), text(key.exponent.as_bytes())),
        ]);
    }
    let point = SubjectPublicKeyInfoOwned::from_der(spki)
        .map(|info| info.subject_public_key.raw_bytes().to_vec())
        .unwrap_or_default();
    // An uncompressed point: 4, then 32 bytes of each coordinate.
    match point.split_first() {
        Some((4, coordinates)) if coordinates.len() == 64 => {
            let (x, y) = coordinates.split_at(32);
            Map::from_iter([
                ("kty".to_owned(), json!("EC")),
                ("crv".to_owned(), json!("P-256")),
                ("x".to_owned(), text(x)),
                ("y".to_owned(), text(y)),
            ])
        }
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::clock::Clock;
    use crate::crypto::Suite;
    use crate::embedded::ca::{Authorities, AuthorityType};
    use crate::embedded::store::Store;

    #[test]
    fn documents_have_the_members_of_a_real_clusters() {
        let store = Store::in_memory(Clock::system()).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        let authorities = Authorities::open(&store, "c.example", Suite::BalancedV1, now).unwrap();
        let authority = authorities.get(AuthorityType::Spiffe);
        let bundle = spiffe_bundle(&authority);
        let members = |value: &Value| -> BTreeSet<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let set = |names: &[&str]| -> BTreeSet<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        let ec = ["use", "kty", "crv", "x", "y", "x5c"];
        assert_eq!(members(&bundle["keys"][0]), set(&ec));
        let rsa = ["use", "kty", "kid", "n", "e"];
        assert_eq!(members(&bundle["keys"][1]), set(&rsa));
        assert_eq!(bundle["keys"][0]["use"], "x509-svid");
        assert_eq!(bundle["keys"][1]["use"], "jwt-svid");
        assert_eq!(bundle["keys"][1]["e"], "AQAB");
        assert_eq!(bundle["spiffe_refresh_hint"], 300);
        assert!(bundle["spiffe_sequence"].is_u64());
        assert_eq!(bundle["keys"][0]["x5c"].as_array().unwrap().len(), 1);

        let keys = jwks(&authority);
        let names = ["kty", "alg", "n", "e", "use", "kid"];
        assert_eq!(members(&keys["keys"][0]), set(&names));
        assert_eq!(keys["keys"][0]["kid"], bundle["keys"][1]["kid"]);

        let mut rotated = authority.clone();
        rotated.active.jwt.clear();
        let sequence = |bundle: &Value| bundle["spiffe_sequence"].as_u64().unwrap();
        assert!(sequence(&spiffe_bundle(&rotated)) > sequence(&bundle));
    }

    #[test]
    fn the_discovery_document_is_a_real_clusters() {
        assert_eq!(
            openid_configuration("example.teleport.sh:3080"),
            json!({
                "issuer": "https://example.teleport.sh:3080/workload-identity",
                "jwks_uri": "https://example.teleport.sh:3080/workload-identity/jwt-jwks.json",
                "claims": ["iss", "sub", "jti", "aud", "exp", "iat"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
            })
        );
        assert_eq!(issuer("a.b:443"), "https://a.b/workload-identity");
    }

    #[test]
    fn the_key_id_is_a_real_clusters() {
        // Recorded from a Teleport 18.0.0 cluster.
        let n = "7c7iySBY49gsjBEop_45F4K9XKoALgaEnGYO1aUk6cQsO7z8Eyc3PmybcMKg-YgN03s3Wsr81WviMgrEsUoUccL4cNGv-Msv-RwZX_PlRdTnQv5321nMz3Xv6EyFHr0zF5ReMu_4V9T1g4Ze5YAJb6FvdkM8S944dNs5eN_ZrugsMPQx2PN-_UwLifoRXLqSNYdBSJvcVqUd3t1hdM8JpeUhOjzOiokqsQjbTmAoNy65ZQcc1GUCW2JbKYm1bYGrvPsH2FtLvy8NyfbbCr2Qwq69MLc1MS40L8ZD7G31aEN7pWB07LCW7mTg2NkH05apzS667u17kJkFwVkpEYCk7w";
        let modulus = URL_SAFE_NO_PAD.decode(n).unwrap();
        let mut pkcs1 = vec![0x30, 0x82, 0x01, 0x0a, 0x02, 0x82, 0x01, 0x01, 0x00];
        pkcs1.extend(modulus);
        pkcs1.extend([0x02, 0x03, 1, 0, 1]);
        let framed = crate::crypto::pem::encode("RSA PUBLIC KEY", &pkcs1);
        let spki = crate::crypto::spki_from_pem(&framed).unwrap();
        assert_eq!(key_id(&spki), "bIrF-y4c96lizfsw20vrnjilb_VIPsEL7l5xuj6Yuo0");
        assert_eq!(public_key(&spki)["n"], n);
    }
}
