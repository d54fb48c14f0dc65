//! Who calls: the address, the listener that took the connection, and the identity in the client
//! certificate.
//!
//! A Teleport identity lives in the subject name of its certificate (upstream `lib/tlsca/ca.go`):
//! the common name is the user, organizations are roles, localities are logins, and everything
//! else has an object identifier of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::SystemTime;

use der::asn1::ObjectIdentifier;
use serde_json::Value;

use crate::crypto::x509::{COMMON_NAME, Certificate, ORGANIZATION};

/// Object identifiers of identity fields in a subject name.
pub mod oid {
    use der::asn1::ObjectIdentifier;

    const fn of(text: &str) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(text)
    }

    /// Serial number: in the subjects of authorities only, in decimal.
    pub const SERIAL_NUMBER: ObjectIdentifier = of("2.5.4.5");
    /// Locality: the logins.
    pub const LOCALITY: ObjectIdentifier = of("2.5.4.7");
    /// Street address: the cluster that the certificate is routed to.
    pub const STREET: ObjectIdentifier = of("2.5.4.9");
    /// Organizational unit: a restriction of use.
    pub const ORGANIZATIONAL_UNIT: ObjectIdentifier = of("2.5.4.11");
    /// Postal code: traits as a JSON object, `null` without any.
    pub const POSTAL_CODE: ObjectIdentifier = of("2.5.4.17");
    /// Kubernetes users, one attribute each.
    pub const KUBERNETES_USER: ObjectIdentifier = of("1.3.9999.1.1");
    /// Kubernetes groups, one attribute each.
    pub const KUBERNETES_GROUP: ObjectIdentifier = of("1.3.9999.1.2");
    /// The Kubernetes cluster that the certificate is routed to.
    pub const KUBERNETES_CLUSTER: ObjectIdentifier = of("1.3.9999.1.3");
    /// The application session.
    pub const APP_SESSION: ObjectIdentifier = of("1.3.9999.1.4");
    /// The cluster of the application.
    pub const APP_CLUSTER: ObjectIdentifier = of("1.3.9999.1.5");
    /// The public address of the application.
    pub const APP_PUBLIC_ADDR: ObjectIdentifier = of("1.3.9999.1.6");
    /// The cluster that issued the identity.
    pub const CLUSTER: ObjectIdentifier = of("1.3.9999.1.7");
    /// The address that asked for the certificate.
    pub const CLIENT_IP: ObjectIdentifier = of("1.3.9999.1.9");
    /// The name of the application.
    pub const APP_NAME: ObjectIdentifier = of("1.3.9999.1.10");
    /// `true` on certificates that may be renewed by themselves.
    pub const RENEWABLE: ObjectIdentifier = of("1.3.9999.1.13");
    /// How often the bot instance has been issued its own certificate.
    pub const GENERATION: ObjectIdentifier = of("1.3.9999.1.14");
    /// What protects the private key; `none` for bots.
    pub const PRIVATE_KEY_POLICY: ObjectIdentifier = of("1.3.9999.1.15");
    /// `local` for users of this cluster.
    pub const USER_TYPE: ObjectIdentifier = of("1.3.9999.1.20");
    /// The database service.
    pub const DATABASE_SERVICE: ObjectIdentifier = of("1.3.9999.2.1");
    /// The database's protocol.
    pub const DATABASE_PROTOCOL: ObjectIdentifier = of("1.3.9999.2.2");
    /// The database's user.
    pub const DATABASE_USER: ObjectIdentifier = of("1.3.9999.2.3");
    /// The name of the database inside the service.
    pub const DATABASE_NAME: ObjectIdentifier = of("1.3.9999.2.4");
    /// Names of databases that the roles allow, one attribute each.
    pub const DATABASE_NAMES: ObjectIdentifier = of("1.3.9999.2.5");
    /// Users of databases that the roles allow, one attribute each.
    pub const DATABASE_USERS: ObjectIdentifier = of("1.3.9999.2.6");
    /// The user that asked for this identity on top of its own.
    pub const IMPERSONATOR: ObjectIdentifier = of("1.3.9999.2.7");
    /// `true` on certificates that cannot get another one.
    pub const DISALLOW_REISSUE: ObjectIdentifier = of("1.3.9999.2.9");
    /// The bot.
    pub const BOT_NAME: ObjectIdentifier = of("1.3.9999.2.18");
    /// The bot instance.
    pub const BOT_INSTANCE: ObjectIdentifier = of("1.3.9999.2.20");
    /// What the join proved, as JSON with the names of the protocol's message fields.
    pub const JOIN_ATTRIBUTES: ObjectIdentifier = of("1.3.9999.2.21");
}

/// The listener that accepted a connection; decides what its calls may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// Mutual TLS end to end with the auth service: certificates count.
    Auth,
    /// The proxy's gRPC side for joining: nobody is anybody.
    ProxyJoin,
    /// The proxy's gRPC side for SSH to nodes: certificates count.
    Nodes,
    /// The proxy's web side.
    Web,
}

/// Who makes a call; an extension of every request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The peer's address.
    pub addr: SocketAddr,
    /// Where it came in.
    pub listener: Listener,
    /// What its certificate says, where certificates count and if it showed one of ours.
    pub identity: Option<TlsIdentity>,
}

/// The identity in a client certificate that one of the cluster's user authorities signed.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsIdentity {
    /// The user, for a bot `bot-<name>`.
    pub user: String,
    /// Roles, in the certificate's order.
    pub roles: Vec<String>,
    /// Logins, in the certificate's order.
    pub logins: Vec<String>,
    /// The cluster that issued the identity.
    pub cluster: String,
    /// Traits by name.
    pub traits: BTreeMap<String, Vec<String>>,
    /// Whether the certificate may be renewed with itself (join method `token`).
    pub renewable: bool,
    /// Generation of the bot instance; 0 on output certificates.
    pub generation: u32,
    /// The bot; empty if the user is none.
    pub bot_name: String,
    /// The bot instance, a UUID; empty if the user is no bot.
    pub bot_instance_id: String,
    /// Whether no further certificate may be asked for with this one.
    pub disallow_reissue: bool,
    /// The user on whose behalf the roles were given; empty on a bot's own certificate.
    pub impersonator: String,
    /// What the join proved; `Null` if unknown.
    pub join_attributes: Value,
    /// The same as the certificate writes it; empty if unknown.
    pub join_attributes_text: String,
    /// The address recorded when the certificate was made.
    pub client_ip: String,
    /// End of validity.
    pub expires: SystemTime,
}

/// Why a certificate holds no identity that is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The certificate is limited to one use, which none of the services here is.
    #[error("access denied: invalid client certificate")]
    Restricted,
    /// The subject lacks a user name, or a field of it cannot be read.
    #[error("access denied: the client certificate's {0} cannot be read")]
    Malformed(&'static str),
    /// More than one certificate was shown; users' certificates have no intermediates.
    #[error("access denied: intermediaries are not supported")]
    Chain,
}

impl TlsIdentity {
    /// Reads the subject of `certificate`. Whether it is trusted is the caller's question.
    ///
    /// # Errors
    /// [`IdentityError`]; a field that is not understood is never passed over as if absent.
    pub fn from_certificate(certificate: &Certificate) -> Result<Self, IdentityError> {
        if !certificate.subject(oid::ORGANIZATIONAL_UNIT).is_empty() {
            return Err(IdentityError::Restricted);
        }
        let one = |oid: ObjectIdentifier| certificate.subject(oid).into_iter().next();
        let text = |oid| one(oid).unwrap_or_default();
        let user = one(COMMON_NAME)
            .filter(|user| !user.is_empty())
            .ok_or(IdentityError::Malformed("user name"))?;
        let traits = match one(oid::POSTAL_CODE) {
            None => BTreeMap::new(),
            Some(json) => serde_json::from_str::<Option<_>>(&json)
                .map_err(|_source| IdentityError::Malformed("traits"))?
                .unwrap_or_default(),
        };
        let generation = match one(oid::GENERATION) {
            None => 0,
            Some(number) => number
                .parse()
                .map_err(|_source| IdentityError::Malformed("generation"))?,
        };
        let join_attributes_text = text(oid::JOIN_ATTRIBUTES);
        let join_attributes = if join_attributes_text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&join_attributes_text)
                .map_err(|_source| IdentityError::Malformed("join attributes"))?
        };
        Ok(Self {
            user,
            roles: certificate.subject(ORGANIZATION),
            logins: certificate.subject(oid::LOCALITY),
            cluster: text(oid::CLUSTER),
            traits,
            renewable: flag(&text(oid::RENEWABLE)),
            generation,
            bot_name: text(oid::BOT_NAME),
            bot_instance_id: text(oid::BOT_INSTANCE),
            disallow_reissue: flag(&text(oid::DISALLOW_REISSUE)),
            impersonator: text(oid::IMPERSONATOR),
            join_attributes,
            join_attributes_text,
            client_ip: text(oid::CLIENT_IP),
            expires: certificate.not_after(),
        })
    }
}

impl TlsIdentity {
    /// The name of the token that the identity comes from; empty for the join method `token`,
    /// where the name is a secret.
    #[must_use]
    pub fn join_token(&self) -> &str {
        let name = self.join_attributes.pointer("/meta/join_token_name");
        name.and_then(Value::as_str).unwrap_or_default()
    }
}

fn flag(text: &str) -> bool {
    text == "true"
}
