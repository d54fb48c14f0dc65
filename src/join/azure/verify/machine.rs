//! Which machine an access token is of: what its claims say, or what Azure says of the machine that
//! was attested.

use serde_json::Value;

use super::AzureError;
use crate::join::verify::World;
use crate::outbound::{OutboundError, Target};
use http::{Request, StatusCode, header};
use http_body_util::Full;

const MANAGEMENT: &str = "management.azure.com";
const API_VERSION: &str = "2024-07-01";
/// The longest page of machines that is read, in bytes, and how many pages.
const MAX_PAGE: usize = 8 * 1024 * 1024;
const MAX_PAGES: usize = 50;
/// Resources that speak for the subscription and the resource group that they are in.
const COMPUTE: &[&str] = &[
    "virtualMachines",
    "virtualMachineScaleSets",
    "containerGroups",
    "managedClusters",
];

/// Where a machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Its subscription's ID.
    pub(super) subscription: String,
    /// Its resource group, in whatever case Azure wrote it.
    pub(super) resource_group: String,
}

/// A resource ID, taken apart:
/// `/subscriptions/S/resourceGroups/G/providers/NAMESPACE/TYPE/NAME[/TYPE/NAME…]`.
#[derive(Debug, PartialEq, Eq)]
struct ResourceId<'a> {
    subscription: &'a str,
    resource_group: &'a str,
    types: Vec<&'a str>,
}

impl<'a> ResourceId<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.strip_prefix('/')?.split('/').collect();
        let [
            subscriptions,
            subscription,
            groups,
            resource_group,
            providers,
            namespace,
            rest @ ..,
        ] = parts.as_slice()
        else {
            return None;
        };
        let well = subscriptions.eq_ignore_ascii_case("subscriptions")
            && groups.eq_ignore_ascii_case("resourceGroups")
            && providers.eq_ignore_ascii_case("providers")
            && [subscription, resource_group, namespace]
                .iter()
                .all(|part| !part.is_empty())
            && !rest.is_empty()
            && rest.len() % 2 == 0
            && rest.iter().all(|part| !part.is_empty());
        well.then(|| Self {
            subscription,
            resource_group,
            types: rest.iter().step_by(2).copied().collect(),
        })
    }

    fn is_compute(&self) -> bool {
        self.types
            .iter()
            .any(|kind| COMPUTE.iter().any(|known| kind.eq_ignore_ascii_case(known)))
    }

    fn place(&self) -> Place {
        Place {
            subscription: self.subscription.to_owned(),
            resource_group: self.resource_group.to_owned(),
        }
    }
}

/// The place that the claims of an access token name. `xms_az_rid` is the machine of a user-assigned
/// identity; `xms_mirid` is the machine of its own identity, or else a user-assigned identity, which
/// says nothing of the machine.
pub(super) fn of_claims(claims: &serde_json::Map<String, Value>) -> Option<Place> {
    let text = |name: &str| {
        let text = claims.get(name).and_then(Value::as_str);
        text.filter(|text| !text.is_empty())
    };
    let id = ResourceId::read(text("xms_az_rid").or_else(|| text("xms_mirid"))?)?;
    id.is_compute().then(|| id.place())
}

/// Asks Azure for the machine `vm_id` of a subscription, with the machine's own access token.
pub(super) async fn look_up(
    world: &World,
    subscription: &str,
    vm_id: &str,
    access_token: &str,
) -> Result<Place, AzureError> {
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if subscription.is_empty() || !plain(subscription) {
        return Err(AzureError::Document("its subscription is no ID"));
    }
    let target = Target::https(MANAGEMENT);
    let mut path = format!(
        "/subscriptions/{subscription}/providers/Microsoft.Compute/virtualMachines?api-version={API_VERSION}"
    );
    for _ in 0..MAX_PAGES {
        let request = Request::get(&path)
            .header(header::HOST, target.authority())
            .header(header::AUTHORIZATION, format!("Bearer {access_token}"))
            .header(header::ACCEPT, "application/json")
            .body(Full::default())
            .map_err(OutboundError::from)?;
        let answer = world.outbound.send(&target, request, MAX_PAGE).await?;
        if answer.status != StatusCode::OK {
            return Err(AzureError::LookUp(answer.status));
        }
        let page: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        if let Some(place) = listed(&page, vm_id) {
            return place;
        }
        match next_page(&page) {
            Some(next) => next.clone_into(&mut path),
            None => return Err(AzureError::NoMachine),
        }
    }
    Err(AzureError::NoMachine)
}

/// Where the machine `vm_id` is, if it is on this page.
pub(super) fn listed(page: &Value, vm_id: &str) -> Option<Result<Place, AzureError>> {
    let real = |machine: &Value| {
        let real = machine.pointer("/properties/vmId").and_then(Value::as_str);
        real.is_some_and(|real| real.eq_ignore_ascii_case(vm_id))
    };
    let mut machines = page.get("value")?.as_array()?.iter();
    let id = machines.find(|machine| real(machine))?.get("id");
    let id = id.and_then(Value::as_str).and_then(ResourceId::read);
    Some(id.map(|id| id.place()).ok_or(AzureError::NoMachine))
}

/// The path of the page after this one. It has to be Azure's too: the access token goes along.
pub(super) fn next_page(page: &Value) -> Option<&str> {
    let next = page.get("nextLink")?.as_str()?;
    let path = next.strip_prefix("https://")?.strip_prefix(MANAGEMENT)?;
    path.starts_with('/').then_some(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_name_a_machine_only_by_its_own_id() {
        let vm = "/subscriptions/S/resourcegroups/G/providers/Microsoft.Compute/virtualMachines/v";
        let scale_set = "/subscriptions/S/resourceGroups/G/providers/Microsoft.Compute/virtualMachineScaleSets/s/virtualMachines/0";
        let identity = "/subscriptions/S/resourcegroups/I/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i";
        let place = Some(Place {
            subscription: "S".to_owned(),
            resource_group: "G".to_owned(),
        });
        for (claims, expected) in [
            (json!({"xms_mirid": vm}), place.clone()),
            (
                json!({"xms_mirid": identity, "xms_az_rid": vm}),
                place.clone(),
            ),
            (json!({"xms_az_rid": scale_set}), place),
            (json!({"xms_mirid": identity}), None),
            (json!({"xms_mirid": vm, "xms_az_rid": identity}), None),
            (json!({"xms_mirid": 7}), None),
            (json!({}), None),
        ] {
            assert_eq!(of_claims(claims.as_object().unwrap()), expected, "{claims}");
        }
    }

    #[test]
    fn resource_ids_are_taken_as_a_whole_or_not_at_all() {
        for bad in [
            "",
            "/",
            "subscriptions/S/resourceGroups/G/providers/N/virtualMachines/v",
            "/subscriptions/S/resourceGroups/G",
            "/subscriptions/S/resourceGroups/G/providers/N",
            "/subscriptions/S/resourceGroups/G/providers/N/virtualMachines",
            "/subscriptions//resourceGroups/G/providers/N/virtualMachines/v",
            "/subscriptions/S/resourceGroups/G/providers/N/virtualMachines/v/",
            "/x/S/resourceGroups/G/providers/N/virtualMachines/v",
        ] {
            assert_eq!(ResourceId::read(bad), None, "{bad}");
        }
    }
}
