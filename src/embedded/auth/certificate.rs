//! Certificates of users: one identity written as an X.509 subject, as SSH extensions, and as an
//! audit event. Attributes come in the order recorded from an 18.0.0 cluster.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use x509_cert::name::RdnSequence;

use super::roles::RoleSet;
use super::served::Routes;
use crate::crypto::ssh::{Holder, NewCertificate};
use crate::crypto::x509::{COMMON_NAME, ORGANIZATION};
use crate::crypto::{pem, random};
use crate::embedded::SERVER_VERSION;
use crate::embedded::ca::mint::{self, CLIENT_AUTH, MintError, SERVER_AUTH, Subject, Template};
use crate::embedded::ca::{Authorities, AuthorityType, BACKDATE, leaf_usage};
use crate::embedded::caller::oid;
use crate::embedded::instant::rfc3339;
use crate::pb::proto::Certs;
use crate::refusal::Refusal;

/// A login that every bot certificate has, for joining through a proxy.
const JOIN_LOGIN: &str = "-teleport-internal-join";
/// How events write "no time": Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// Everything that a certificate says about a user.
#[derive(Debug, Clone)]
pub(super) struct Identity<'a> {
    /// `bot-<name>`.
    pub(super) user: &'a str,
    /// The roles and what they give.
    pub(super) roles: &'a RoleSet,
    /// The logins; see [`logins`].
    pub(super) logins: &'a [String],
    /// Traits of the user.
    pub(super) traits: &'a BTreeMap<String, Vec<String>>,
    /// This cluster.
    pub(super) cluster: &'a str,
    /// What the certificate is for.
    pub(super) routes: &'a Routes,
    /// The address that asks.
    pub(super) client_ip: String,
    /// Whether it may renew itself.
    pub(super) renewable: bool,
    /// The generation; 0 for outputs.
    pub(super) generation: u32,
    /// The bot.
    pub(super) bot_name: &'a str,
    /// Its instance.
    pub(super) bot_instance: &'a str,
    /// Whether it is the end of a chain of requests.
    pub(super) disallow_reissue: bool,
    /// The bot's user on certificates with other roles than its own.
    pub(super) impersonator: &'a str,
    /// What the join proved, as JSON text.
    pub(super) join_attributes: &'a str,
    /// End of validity.
    pub(super) expires: SystemTime,
}

/// Public keys to be certified; each is optional, not both.
#[derive(Debug, Clone, Default)]
pub(super) struct PublicKeys {
    /// SubjectPublicKeyInfo DER for the TLS certificate.
    pub(super) tls: Option<Vec<u8>>,
    /// SubjectPublicKeyInfo DER for the SSH certificate.
    pub(super) ssh: Option<Vec<u8>>,
}

/// The logins of the roles, or one that no machine has, and the one for joining.
pub(super) fn logins(roles: &RoleSet) -> Vec<String> {
    let mut logins = roles.logins.clone();
    if logins.is_empty() {
        logins.push(format!("-teleport-nologin-{}", uuid::Uuid::new_v4()));
    }
    logins.push(JOIN_LOGIN.to_owned());
    logins
}

impl Identity<'_> {
    /// Signs both certificates and adds the authorities that an agent trusts afterwards: users'
    /// always, hosts' if this is the bot's own identity.
    pub(super) fn sign(
        &self,
        authorities: &Authorities,
        keys: &PublicKeys,
        own: bool,
        now: SystemTime,
    ) -> Result<Certs, Refusal> {
        if keys.tls.is_none() && keys.ssh.is_none() {
            return Err(Refusal::bad_parameter("must provide a public key"));
        }
        let user_ca = authorities.get(AuthorityType::User);
        let tls = match &keys.tls {
            None => Vec::new(),
            Some(spki) => {
                let der = Template {
                    serial: mint::serial(),
                    subject: self.subject()?,
                    not_before: now - BACKDATE,
                    not_after: self.expires,
                    spki,
                    key_usage: leaf_usage(spki),
                    extended: &[SERVER_AUTH, CLIENT_AUTH],
                    authority: false,
                    names: Vec::new(),
                }
                .sign(user_ca.signer()?.issuer())?;
                pem::encode("CERTIFICATE", &der).into_bytes()
            }
        };
        let ssh = match &keys.ssh {
            None => Vec::new(),
            Some(spki) => NewCertificate {
                holder: Holder::User,
                spki,
                serial: u64::from_be_bytes(random()),
                key_id: self.user,
                principals: self.logins,
                valid_after: now - BACKDATE,
                valid_before: self.expires,
                extensions: &self.extensions(),
            }
            .sign(user_ca.ssh_signer()?)
            .map_err(|source| Refusal::bad_parameter(format!("the SSH public key: {source}")))?
            .into_bytes(),
        };
        let trusted: &[AuthorityType] = if own {
            &[AuthorityType::User, AuthorityType::Host]
        } else {
            &[AuthorityType::User]
        };
        let pem = |der: Vec<u8>| pem::encode("CERTIFICATE", &der).into_bytes();
        Ok(Certs {
            ssh,
            tls,
            tlsca_certs: trusted
                .iter()
                .flat_map(|kind| authorities.trusted_tls(*kind))
                .map(pem)
                .collect(),
            sshca_certs: trusted
                .iter()
                .flat_map(|kind| authorities.trusted_ssh(*kind))
                .map(String::into_bytes)
                .collect(),
        })
    }

    fn traits_json(&self) -> String {
        if self.traits.is_empty() {
            "null".to_owned()
        } else {
            json!(self.traits).to_string()
        }
    }

    fn subject(&self) -> Result<RdnSequence, MintError> {
        let mut subject = Subject::default()
            .set(oid::LOCALITY, self.logins)?
            .one(oid::STREET, self.cluster)?
            .one(oid::POSTAL_CODE, &self.traits_json())?
            .set(ORGANIZATION, &self.roles.names)?
            .one(COMMON_NAME, self.user)?;
        let each = |subject: Subject, oid, values: &[String]| {
            values
                .iter()
                .try_fold(subject, |subject, value| subject.one(oid, value))
        };
        subject = each(subject, oid::KUBERNETES_USER, &self.roles.kubernetes_users)?;
        subject = each(
            subject,
            oid::KUBERNETES_GROUP,
            &self.roles.kubernetes_groups,
        )?;
        subject = subject.one(oid::KUBERNETES_CLUSTER, &self.routes.kube_cluster)?;
        if let Some(route) = &self.routes.app {
            subject = subject
                .one(oid::APP_SESSION, &route.session)?
                .one(oid::APP_PUBLIC_ADDR, &route.public_addr)?
                .one(oid::APP_CLUSTER, self.cluster)?
                .one(oid::APP_NAME, &route.name)?;
        }
        subject = subject
            .one(oid::CLUSTER, self.cluster)?
            .one(oid::CLIENT_IP, &self.client_ip)?;
        if let Some(route) = &self.routes.database {
            subject = subject
                .one(oid::DATABASE_SERVICE, &route.service_name)?
                .one(oid::DATABASE_PROTOCOL, &route.protocol)?
                .one(oid::DATABASE_USER, &route.username)?
                .one(oid::DATABASE_NAME, &route.database)?;
        }
        subject = each(subject, oid::DATABASE_NAMES, &self.roles.database_names)?;
        subject = each(subject, oid::DATABASE_USERS, &self.roles.database_users)?;
        let flag = |set| if set { "true" } else { "" };
        let generation = match self.generation {
            0 => String::new(),
            number => number.to_string(),
        };
        Ok(subject
            .one(oid::IMPERSONATOR, self.impersonator)?
            .one(oid::DISALLOW_REISSUE, flag(self.disallow_reissue))?
            .one(oid::RENEWABLE, flag(self.renewable))?
            .one(oid::GENERATION, &generation)?
            .one(oid::BOT_NAME, self.bot_name)?
            .one(oid::BOT_INSTANCE, self.bot_instance)?
            .one(oid::USER_TYPE, "local")?
            .one(oid::PRIVATE_KEY_POLICY, "none")?
            .one(oid::JOIN_ATTRIBUTES, self.join_attributes)?
            .finish())
    }

    fn extensions(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut add = |name: &str, value: String| all.insert(name.to_owned(), value);
        add("permit-pty", String::new());
        add(
            "teleport-roles",
            json!({"roles": self.roles.names}).to_string(),
        );
        add("teleport-traits", self.traits_json());
        add("teleport-route-to-cluster", self.cluster.to_owned());
        add("private-key-policy", "none".to_owned());
        add("login-ip", self.client_ip.clone());
        for (name, set) in [
            ("permit-port-forwarding", self.roles.forward_ports),
            ("permit-agent-forwarding", self.roles.forward_agent),
            ("permit-X11-forwarding", self.roles.forward_x11),
            ("disallow-reissue", self.disallow_reissue),
            ("renewable", self.renewable),
        ] {
            if set {
                add(name, String::new());
            }
        }
        let generation = match self.generation {
            0 => String::new(),
            number => number.to_string(),
        };
        for (name, value) in [
            ("bot-instance-id@goteleport.com", self.bot_instance),
            ("bot-name@goteleport.com", self.bot_name),
            ("generation", &generation),
            ("impersonator", self.impersonator),
        ] {
            if !value.is_empty() {
                add(name, value.to_owned());
            }
        }
        all
    }

    /// The event that tells of the certificate.
    pub(super) fn event(&self, user_agent: &str) -> Value {
        let mut identity = Map::new();
        let mut add = |key: &str, value: Value| {
            let empty = match &value {
                Value::String(text) => text.is_empty(),
                Value::Array(items) => items.is_empty(),
                Value::Bool(set) => !set,
                Value::Null | Value::Number(_) | Value::Object(_) => false,
            };
            if !empty {
                identity.insert(key.to_owned(), value);
            }
        };
        add("user", self.user.into());
        add("roles", json!(self.roles.names));
        add("logins", json!(self.logins));
        add("kubernetes_users", json!(self.roles.kubernetes_users));
        add("kubernetes_groups", json!(self.roles.kubernetes_groups));
        add("database_names", json!(self.roles.database_names));
        add("database_users", json!(self.roles.database_users));
        add(
            "kubernetes_cluster",
            self.routes.kube_cluster.clone().into(),
        );
        if let Some(route) = &self.routes.app {
            let route = json!({
                "name": route.name,
                "public_addr": route.public_addr,
                "cluster_name": self.cluster,
                "session_id": route.session,
            });
            add("route_to_app", route);
        }
        if let Some(route) = &self.routes.database {
            let route = json!({
                "service_name": route.service_name,
                "protocol": route.protocol,
                "username": route.username,
                "database": route.database,
            });
            add("route_to_database", route);
        }
        add("client_ip", self.client_ip.clone().into());
        add("expires", rfc3339(self.expires).into());
        add("route_to_cluster", self.cluster.into());
        add("teleport_cluster", self.cluster.into());
        add("bot_name", self.bot_name.into());
        add("bot_instance_id", self.bot_instance.into());
        add("impersonator", self.impersonator.into());
        add("disallow_reissue", self.disallow_reissue.into());
        add("private_key_policy", "none".into());
        add("prev_identity_expires", NEVER.into());
        json!({
            "event": "cert.create",
            "code": "TC000I",
            "cert_type": "user",
            "identity": identity,
            "user_agent": user_agent,
        })
    }
    /// The event that tells of the session with an application, if the certificate is for one.
    pub(super) fn session_event(&self) -> Option<Value> {
        let route = self.routes.app.as_ref()?;
        Some(json!({
            "event": "app.session.start",
            "code": "T2007I",
            "sid": route.session,
            "app_name": route.name,
            "app_public_addr": route.public_addr,
            "public_addr": route.public_addr,
            "namespace": "default",
            "server_version": SERVER_VERSION,
            "user": self.user,
            "user_kind": 2,
            "bot_name": self.bot_name,
            "bot_instance_id": self.bot_instance,
        }))
    }
}
