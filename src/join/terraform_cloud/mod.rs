//! Join method `terraform_cloud`: the workload identity token of a run of HCP Terraform or Terraform
//! Enterprise, which stands in its environment.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// The key of the tag that tells several tokens of a run apart.
const KEY: &str = "audience_tag";
/// The variable without a tag.
const VARIABLE: &str = "TFC_WORKLOAD_IDENTITY_TOKEN";

/// Join method `terraform_cloud`.
#[derive(Debug, Clone, Copy)]
pub struct TerraformCloud;

impl TerraformCloud {
    fn with(tag: Option<String>) -> Arc<dyn Prover> {
        let tree = tag
            .as_ref()
            .map(|tag| Tree::map([(KEY, Some(Tree::text(tag)))]));
        let name = match tag {
            Some(tag) => format!("{VARIABLE}_{}", tag.to_uppercase()),
            None => VARIABLE.to_owned(),
        };
        Arc::new(Variable {
            method: &Self,
            name,
            remedy: "set the workspace's environment variable TFC_WORKLOAD_IDENTITY_AUDIENCE, or \
                     TFC_WORKLOAD_IDENTITY_AUDIENCE_<TAG> where onboarding.terraform.audience_tag is \
                     set, to the cluster's name",
            tree,
        })
    }
}

impl JoinMethod for TerraformCloud {
    fn name(&self) -> &'static str {
        "terraform_cloud"
    }

    fn section(&self) -> Option<&'static str> {
        Some("terraform")
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Self::with(section.and_then(|section| section.string(KEY)))
    }

    fn with_parameter(&self, parameter: Secret<String>) -> Option<Arc<dyn Prover>> {
        Some(Self::with(Some(parameter.expose().clone())))
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a terraform_cloud token, that the workspace's \
         TFC_WORKLOAD_IDENTITY_AUDIENCE is the token's audience or else the cluster's name, that its \
         hostname is set for Terraform Enterprise, that one of its allow rules has this organization \
         and workspace or project, and that the cluster's clock is right)"
    }
}
