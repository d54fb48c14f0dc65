//! Heartbeats: what a bot instance says about itself, kept in its record.
//!
//! All of it is what a client claims, so nothing is kept that is longer than an honest agent's.

use serde_json::{Value, json};
use tonic::{Request, Response, Status};

use super::{Auth, Refusal, blocking, caller, instance};
use crate::embedded::instant::{from_wire, rfc3339};
use crate::pb::teleport::machineid::v1 as machineid;
use crate::pb::teleport::machineid::v1::bot_instance_service_server::BotInstanceService;

/// The longest version, method, name or type that is kept, in bytes; agents cut names of services
/// there themselves.
const MAX_WORD: usize = 64;
/// The longest name of a machine (RFC 1035 section 2.3.4).
const MAX_HOST: usize = 255;
/// The longest reason of a service's state; agents cut it there themselves.
const MAX_REASON: usize = 256;
/// Services of one agent whose health is kept.
const MAX_SERVICES: usize = 128;

#[tonic::async_trait]
impl BotInstanceService for Auth {
    async fn submit_heartbeat(
        &self,
        request: Request<machineid::SubmitHeartbeatRequest>,
    ) -> Result<Response<machineid::SubmitHeartbeatResponse>, Status> {
        let identity = self.authorized(caller(&request)?).await?;
        let request = request.into_inner();
        let lacks = |what| Refusal::denied(format!("identity did not contain {what}"));
        if identity.bot_name.is_empty() {
            return Err(lacks("bot name").into());
        }
        if identity.bot_instance_id.is_empty() {
            return Err(lacks("bot instance ID").into());
        }
        let heartbeat = request
            .heartbeat
            .ok_or_else(|| Refusal::bad_parameter("heartbeat: must be non-nil"))?;
        let (heartbeat, health) = (
            heartbeat_json(&heartbeat),
            health_json(&request.service_health),
        );
        let store = self.state.store.clone();
        blocking(move || {
            store.transaction(|tx| {
                let (bot, id) = (&identity.bot_name, &identity.bot_instance_id);
                instance::heartbeat(tx, bot, id, heartbeat, health)
            })
        })
        .await?;
        Ok(Response::new(machineid::SubmitHeartbeatResponse {}))
    }
}

/// The beginning of a word.
fn short(text: &str) -> &str {
    cut(text, MAX_WORD)
}

/// The beginning of `text` that has at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most))
        .unwrap_or_default()
}

fn timestamp(time: Option<&prost_types::Timestamp>) -> String {
    time.and_then(|time| from_wire(*time))
        .map(rfc3339)
        .unwrap_or_default()
}

/// A heartbeat as a bot instance shows it: the protocol's field names, empty fields left out.
fn heartbeat_json(heartbeat: &machineid::BotInstanceStatusHeartbeat) -> Value {
    let uptime = heartbeat.uptime.map(|uptime| {
        let fraction = format!("{:09}", uptime.nanos.unsigned_abs());
        let fraction = fraction.trim_end_matches('0');
        let dot = if fraction.is_empty() { "" } else { "." };
        format!("{}{dot}{fraction}s", uptime.seconds)
    });
    let mut value = json!({
        "recorded_at": timestamp(heartbeat.recorded_at.as_ref()),
        "is_startup": heartbeat.is_startup,
        "version": short(&heartbeat.version),
        "hostname": cut(&heartbeat.hostname, MAX_HOST),
        "uptime": uptime,
        "join_method": short(&heartbeat.join_method),
        "one_shot": heartbeat.one_shot,
        "architecture": short(&heartbeat.architecture),
        "os": short(&heartbeat.os),
        "external_updater": short(&heartbeat.external_updater),
        "external_updater_version": short(&heartbeat.external_updater_version),
    });
    if let Some(members) = value.as_object_mut() {
        members.retain(|_, member| {
            !matches!(member, Value::Null | Value::Bool(false)) && member != ""
        });
    }
    value
}

fn health_json(services: &[machineid::BotInstanceServiceHealth]) -> Value {
    services
        .iter()
        .take(MAX_SERVICES)
        .map(|health| {
            let service = health.service.clone().unwrap_or_default();
            json!({
                "service": {
                    "type": cut(&service.r#type, MAX_WORD),
                    "name": cut(&service.name, MAX_WORD),
                },
                "status": health.status().as_str_name(),
                "reason": health.reason.as_deref().map(|reason| cut(reason, MAX_REASON)),
                "updated_at": timestamp(health.updated_at.as_ref()),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_read_as_a_cluster_shows_them() {
        let heartbeat = machineid::BotInstanceStatusHeartbeat {
            recorded_at: Some(prost_types::Timestamp {
                seconds: 1_800_000_000,
                nanos: 0,
            }),
            is_startup: true,
            version: "18.0.0".to_owned(),
            uptime: Some(prost_types::Duration {
                seconds: 0,
                nanos: 103_123_556,
            }),
            ..machineid::BotInstanceStatusHeartbeat::default()
        };
        assert_eq!(
            heartbeat_json(&heartbeat),
            json!({
                "recorded_at": "2027-01-15T08:00:00Z",
                "is_startup": true,
                "version": "18.0.0",
                "uptime": "0.103123556s",
            })
        );
    }

    #[test]
    fn what_is_too_long_is_cut_between_characters() {
        let long = "é".repeat(1000);
        let heartbeat = machineid::BotInstanceStatusHeartbeat {
            version: long.clone(),
            hostname: long.clone(),
            join_method: long.clone(),
            architecture: long.clone(),
            os: long.clone(),
            external_updater: long.clone(),
            external_updater_version: long.clone(),
            ..machineid::BotInstanceStatusHeartbeat::default()
        };
        let heartbeat = heartbeat_json(&heartbeat);
        assert_eq!(heartbeat["hostname"], "é".repeat(127));
        assert_eq!(heartbeat["version"], "é".repeat(32));
        assert!(heartbeat.to_string().len() < 1024);
        let health = machineid::BotInstanceServiceHealth {
            service: Some(machineid::BotInstanceServiceIdentifier {
                r#type: long.clone(),
                name: long.clone(),
            }),
            reason: Some(long),
            ..machineid::BotInstanceServiceHealth::default()
        };
        let health = health_json(&vec![health; 1000]);
        assert_eq!(health.as_array().unwrap().len(), 128);
        assert_eq!(health[0]["reason"], "é".repeat(128));
        assert!(health.to_string().len() < 128 * 640);
    }
}
