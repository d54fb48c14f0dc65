//! Signature algorithm suites: which key a cluster wants for which purpose
//! (upstream `lib/cryptosuites/suites.go`).

use crate::pb::types::SignatureAlgorithmSuite;

/// A cluster's signature algorithm suite. An unspecified one counts as [`Suite::Legacy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Suite {
    /// RSA 2048 everywhere.
    #[default]
    Legacy,
    /// ECDSA P-256 for TLS, Ed25519 for SSH authorities.
    BalancedV1,
    /// ECDSA P-256 everywhere.
    FipsV1,
    /// Like balanced, with ECDSA where hardware modules need it.
    HsmV1,
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The bot's own identity: joined or renewed.
    HostIdentity,
    /// The identity of an output.
    BotImpersonated,
    /// A client of databases.
    DatabaseClient,
    /// The key of an SSH server.
    HostSsh,
    /// A workload's SVID.
    BotSvid,
    /// The key that a bot of join method `bound_keypair` proves itself with.
    BoundKeypair,
    /// TLS key of the user, host and SPIFFE authorities.
    TlsAuthority,
    /// SSH key of the user and host authorities.
    SshAuthority,
}

/// A key algorithm of the suites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyAlgorithm {
    /// RSA with a 2048-bit modulus.
    Rsa2048,
    /// ECDSA on NIST P-256.
    EcdsaP256,
    /// Ed25519.
    Ed25519,
}

impl Suite {
    /// Reads the name used in `/webapi/find` (`balanced-v1` …). Unknown names count as legacy,
    /// the only suite that every cluster accepts.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        match name {
            "balanced-v1" => Self::BalancedV1,
            "fips-v1" => Self::FipsV1,
            "hsm-v1" => Self::HsmV1,
            _ => Self::Legacy,
        }
    }

    /// The name used in `/webapi/find`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::BalancedV1 => "balanced-v1",
            Self::FipsV1 => "fips-v1",
            Self::HsmV1 => "hsm-v1",
        }
    }

    /// The algorithm of a new key for `purpose`.
    #[must_use]
    pub fn algorithm(self, purpose: Purpose) -> KeyAlgorithm {
        match (self, purpose) {
            (Self::FipsV1, Purpose::BoundKeypair) => KeyAlgorithm::EcdsaP256,
            (_, Purpose::BoundKeypair) => KeyAlgorithm::Ed25519,
            (Self::Legacy, _) | (_, Purpose::DatabaseClient) => KeyAlgorithm::Rsa2048,
            (Self::BalancedV1, Purpose::SshAuthority)
            | (Self::BalancedV1 | Self::HsmV1, Purpose::HostSsh) => KeyAlgorithm::Ed25519,
            (Self::BalancedV1 | Self::FipsV1 | Self::HsmV1, _) => KeyAlgorithm::EcdsaP256,
        }
    }
}

impl From<SignatureAlgorithmSuite> for Suite {
    fn from(wire: SignatureAlgorithmSuite) -> Self {
        match wire {
            SignatureAlgorithmSuite::Unspecified | SignatureAlgorithmSuite::Legacy => Self::Legacy,
            SignatureAlgorithmSuite::BalancedV1 => Self::BalancedV1,
            SignatureAlgorithmSuite::FipsV1 => Self::FipsV1,
            SignatureAlgorithmSuite::HsmV1 => Self::HsmV1,
        }
    }
}

impl From<Suite> for SignatureAlgorithmSuite {
    fn from(suite: Suite) -> Self {
        match suite {
            Suite::Legacy => Self::Legacy,
            Suite::BalancedV1 => Self::BalancedV1,
            Suite::FipsV1 => Self::FipsV1,
            Suite::HsmV1 => Self::HsmV1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for suite in [
            Suite::Legacy,
            Suite::BalancedV1,
            Suite::FipsV1,
            Suite::HsmV1,
        ] {
            assert_eq!(Suite::from_name(suite.name()), suite);
        }
        assert_eq!(Suite::from_name(""), Suite::Legacy);
    }

    #[test]
    fn only_the_legacy_suite_gives_bots_rsa_keys() {
        for purpose in [
            Purpose::HostIdentity,
            Purpose::BotImpersonated,
            Purpose::BotSvid,
        ] {
            assert_eq!(Suite::Legacy.algorithm(purpose), KeyAlgorithm::Rsa2048);
            assert_eq!(
                Suite::BalancedV1.algorithm(purpose),
                KeyAlgorithm::EcdsaP256
            );
        }
        assert_eq!(
            Suite::BalancedV1.algorithm(Purpose::SshAuthority),
            KeyAlgorithm::Ed25519
        );
    }

    #[test]
    fn bound_keys_are_ed25519_unless_fips() {
        for (suite, bound) in [
            (Suite::Legacy, KeyAlgorithm::Ed25519),
            (Suite::BalancedV1, KeyAlgorithm::Ed25519),
            (Suite::FipsV1, KeyAlgorithm::EcdsaP256),
            (Suite::HsmV1, KeyAlgorithm::Ed25519),
        ] {
            assert_eq!(suite.algorithm(Purpose::BoundKeypair), bound, "{suite:?}");
        }
    }

    #[test]
    fn clients_of_databases_have_rsa_and_ssh_servers_ed25519_unless_fips() {
        for (suite, host) in [
            (Suite::Legacy, KeyAlgorithm::Rsa2048),
            (Suite::BalancedV1, KeyAlgorithm::Ed25519),
            (Suite::FipsV1, KeyAlgorithm::EcdsaP256),
            (Suite::HsmV1, KeyAlgorithm::Ed25519),
        ] {
            assert_eq!(
                suite.algorithm(Purpose::DatabaseClient),
                KeyAlgorithm::Rsa2048
            );
            assert_eq!(suite.algorithm(Purpose::HostSsh), host, "{suite:?}");
        }
    }
}
