//! Flags that several kinds have.

use super::{Flag, FlagValue};

/// Where an output writes.
pub(super) const DESTINATION: Flag = Flag {
    name: "destination",
    yaml: "destination",
    value: FlagValue::Destination,
    required: true,
    help: "Where to write the files: a path, file:///path, kubernetes-secret:///name or memory://",
};

/// One workload identity.
pub(super) const NAME_SELECTOR: Flag = Flag {
    name: "name-selector",
    yaml: "selector.name",
    value: FlagValue::Text,
    required: false,
    help: "The name of the workload identity to issue",
};

/// The workload identity of an output, which holds one.
pub(super) const LABEL_SELECTOR: Flag = Flag {
    name: "label-selector",
    yaml: "selector.labels",
    value: FlagValue::Labels,
    required: false,
    help: "Labels of the workload identity to issue, as key=value,key2=value2",
};

/// Whom else the readers of an X.509-SVID believe.
pub(super) const FEDERATED_BUNDLES: Flag = Flag {
    name: "include-federated-trust-bundles",
    yaml: "include_federated_trust_bundles",
    value: FlagValue::Bool,
    required: false,
    help: "Write the bundles of federated trust domains beside the cluster's own",
};
