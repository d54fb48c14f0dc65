//! The names and types of attributes: the fields of the protocol's attribute messages
//! (upstream `api/proto/teleport/workloadidentity/v1/{attrs,join_attrs}.proto`).

/// The type of an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// A boolean.
    Flag,
    /// A number of any width and sign that the protocol uses; all fit `i64`.
    Integer,
    /// Strings by string.
    Map,
    /// A list of strings, which neither conditions nor expressions can use.
    List,
    /// Lists of strings by name: the user's traits.
    Traits,
    /// Something that only the audit log shows.
    Opaque,
    /// A message of further attributes.
    Message(&'static [Field]),
}

/// One attribute of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Its name in the protocol, `snake_case`.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

/// The field `name` of a message; `None` if the protocol has none.
#[must_use]
pub fn field(fields: &'static [Field], name: &str) -> Option<&'static Field> {
    fields.iter().find(|field| field.name == name)
}

const fn of(name: &'static str, kind: Kind) -> Field {
    Field { name, kind }
}

const fn text(name: &'static str) -> Field {
    of(name, Kind::Text)
}

const fn flag(name: &'static str) -> Field {
    of(name, Kind::Flag)
}

const fn integer(name: &'static str) -> Field {
    of(name, Kind::Integer)
}

const fn map(name: &'static str) -> Field {
    of(name, Kind::Map)
}

const fn message(name: &'static str, fields: &'static [Field]) -> Field {
    of(name, Kind::Message(fields))
}

/// All attributes.
pub const ATTRS: &[Field] = &[
    message("workload", WORKLOAD),
    message("user", USER),
    message("join", JOIN),
];

const WORKLOAD: &[Field] = &[
    message(
        "unix",
        &[
            flag("attested"),
            integer("pid"),
            integer("gid"),
            integer("uid"),
            text("binary_path"),
            text("binary_hash"),
        ],
    ),
    message(
        "kubernetes",
        &[
            flag("attested"),
            text("namespace"),
            text("pod_name"),
            text("service_account"),
            text("pod_uid"),
            map("labels"),
            message(
                "container",
                &[text("name"), text("image"), text("image_digest")],
            ),
        ],
    ),
    message(
        "podman",
        &[
            flag("attested"),
            message("container", CONTAINER),
            message("pod", &[text("name"), map("labels")]),
        ],
    ),
    message(
        "docker",
        &[flag("attested"), message("container", CONTAINER)],
    ),
    message("systemd", &[flag("attested"), text("service")]),
    message("sigstore", &[of("payloads", Kind::Opaque)]),
];

const CONTAINER: &[Field] = &[
    text("name"),
    text("image"),
    map("labels"),
    text("image_digest"),
];

const USER: &[Field] = &[
    text("name"),
    flag("is_bot"),
    text("bot_name"),
    text("bot_instance_id"),
    map("labels"),
    of("traits", Kind::Traits),
];

pub(super) const JOIN: &[Field] = &[
    message("meta", &[text("join_token_name"), text("join_method")]),
    message("gitlab", GITLAB),
    message("github", GITHUB),
    message("iam", &[text("account"), text("arn")]),
    message(
        "tpm",
        &[
            text("ek_pub_hash"),
            text("ek_cert_serial"),
            flag("ek_cert_verified"),
        ],
    ),
    message(
        "azure",
        &[text("subscription"), text("resource_group"), text("tenant")],
    ),
    message(
        "circleci",
        &[
            text("sub"),
            of("context_ids", Kind::List),
            text("project_id"),
        ],
    ),
    message("bitbucket", BITBUCKET),
    message("terraform_cloud", TERRAFORM_CLOUD),
    message("spacelift", SPACELIFT),
    message(
        "gcp",
        &[
            text("service_account"),
            message(
                "gce",
                &[text("name"), text("zone"), text("id"), text("project")],
            ),
        ],
    ),
    message(
        "kubernetes",
        &[
            text("subject"),
            message("service_account", &[text("name"), text("namespace")]),
            message("pod", &[text("name")]),
        ],
    ),
    message(
        "oracle",
        &[
            text("tenancy_id"),
            text("compartment_id"),
            text("instance_id"),
        ],
    ),
    message("azure_devops", &[message("pipeline", AZURE_PIPELINE)]),
    message("env0", ENV0),
    message("generic_oidc", &[of("claims", Kind::Opaque)]),
];

const GITLAB: &[Field] = &[
    text("sub"),
    text("ref"),
    text("ref_type"),
    flag("ref_protected"),
    text("namespace_path"),
    text("project_path"),
    text("user_login"),
    text("user_email"),
    text("pipeline_id"),
    text("pipeline_source"),
    text("environment"),
    flag("environment_protected"),
    integer("runner_id"),
    text("runner_environment"),
    text("sha"),
    text("ci_config_ref_uri"),
    text("ci_config_sha"),
];

const GITHUB: &[Field] = &[
    text("sub"),
    text("actor"),
    text("environment"),
    text("ref"),
    text("ref_type"),
    text("repository"),
    text("repository_owner"),
    text("workflow"),
    text("event_name"),
    text("sha"),
    text("run_id"),
    text("enterprise"),
    text("enterprise_id"),
];

const BITBUCKET: &[Field] = &[
    text("sub"),
    text("step_uuid"),
    text("repository_uuid"),
    text("pipeline_uuid"),
    text("workspace_uuid"),
    text("deployment_environment_uuid"),
    text("branch_name"),
];

const TERRAFORM_CLOUD: &[Field] = &[
    text("sub"),
    text("organization_name"),
    text("project_name"),
    text("workspace_name"),
    text("full_workspace"),
    text("run_id"),
    text("run_phase"),
];

const SPACELIFT: &[Field] = &[
    text("sub"),
    text("space_id"),
    text("caller_type"),
    text("caller_id"),
    text("run_type"),
    text("run_id"),
    text("scope"),
];

const AZURE_PIPELINE: &[Field] = &[
    text("sub"),
    text("organization_name"),
    text("project_name"),
    text("pipeline_name"),
    text("organization_id"),
    text("project_id"),
    text("definition_id"),
    text("repository_id"),
    text("repository_version"),
    text("repository_ref"),
    text("run_id"),
];

const ENV0: &[Field] = &[
    text("sub"),
    text("organization_id"),
    text("project_id"),
    text("project_name"),
    text("template_id"),
    text("template_name"),
    text("environment_id"),
    text("environment_name"),
    text("workspace_name"),
    text("deployment_log_id"),
    text("deployment_type"),
    text("deployer_email"),
    text("env0_tag"),
];
