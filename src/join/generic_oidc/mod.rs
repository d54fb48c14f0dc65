//! Join method `generic_oidc`: an ID token of any OIDC issuer, from the environment or from a program
//! that prints it.

mod command;
pub mod verify;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::id_token::{IdToken, Variable};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::yaml::{Fields, Tree, duration};

/// How long a program may take where nothing else is configured.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Join method `generic_oidc`.
#[derive(Debug, Clone, Copy)]
pub struct GenericOidc;

impl JoinMethod for GenericOidc {
    fn name(&self) -> &'static str {
        "generic_oidc"
    }

    fn section(&self) -> Option<&'static str> {
        Some("generic_oidc")
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        let Some(section) = section else {
            return Arc::new(Nowhere);
        };
        let variable = section.string("env");
        let command = section.strings("command").unwrap_or_default();
        let timeout = section.duration("timeout");
        match (variable, command.is_empty()) {
            (Some(_), false) => {
                section.error(
                    "command",
                    "`command` together with `env`",
                    Some("keep the one that has the token"),
                );
                Arc::new(Nowhere)
            }
            (Some(name), true) => Arc::new(Variable {
                method: &Self,
                tree: Some(Tree::map([("env", Some(Tree::text(&name)))])),
                name,
                remedy: "onboarding.generic_oidc.env says that it holds the ID token",
            }),
            (None, false) => Arc::new(Program { command, timeout }),
            (None, true) => {
                section.error(
                    "env",
                    "`generic_oidc` needs `env` or `command`",
                    Some(
                        "name the variable that holds the ID token, or the program that prints it",
                    ),
                );
                Arc::new(Nowhere)
            }
        }
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a generic_oidc token, that its issuer and audience are \
         those of the ID token, that its must_match_fields and one of allow_any fit its claims, and that \
         the cluster's clock is right)"
    }
}

/// Nothing says where the token comes from. The command line cannot, so it is no error before it is
/// needed.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Prover for Nowhere {
    fn method(&self) -> &'static dyn JoinMethod {
        &GenericOidc
    }

    async fn prepare(&self, _around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let problem =
            "onboarding.generic_oidc has to say where the ID token comes from: `env` or `command`";
        Err(JoinError::Missing {
            method: GenericOidc.name(),
            problem: problem.to_owned(),
        })
    }
}

/// A program that prints the token.
#[derive(Debug)]
struct Program {
    command: Vec<String>,
    timeout: Option<Duration>,
}

#[async_trait]
impl Prover for Program {
    fn method(&self) -> &'static dyn JoinMethod {
        &GenericOidc
    }

    fn tree(&self) -> Option<Tree> {
        let timeout = self
            .timeout
            .map(|timeout| Tree::text(duration::format(timeout)));
        let command = Some(Tree::texts(&self.command));
        Some(Tree::map([("command", command), ("timeout", timeout)]))
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let home = around.env.get("HOME").unwrap_or("/");
        let timeout = self.timeout.unwrap_or(TIMEOUT);
        let token = command::run(&self.command, home, timeout).await;
        let token = token.map_err(|error| JoinError::Proof {
            method: GenericOidc.name(),
            problem: error.to_string(),
        })?;
        Ok(IdToken::proof(
            GenericOidc.name(),
            token,
            around.clock.now(),
        ))
    }
}
