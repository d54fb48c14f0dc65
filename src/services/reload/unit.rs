//! Hook `systemd`: reloads a unit, as `systemctl reload-or-try-restart` does.
//!
//! A unit that can reload is reloaded, another is restarted, and one that does not run stays stopped:
//! it will read the new files when it starts.

use std::num::NonZeroUsize;

use futures_util::StreamExt as _;
use zbus::wire::OwnedObjectPath;
use zbus::{MessageStream, OwnedMatchRule, fdo};

use super::HookError;
use crate::attest::systemd::bus::{INTERFACE, Wire};

/// Ends of other jobs that may wait here unread.
const QUEUE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// Reloads `unit` and waits until that is done.
pub(super) async fn reload(unit: &str) -> Result<(), HookError> {
    let done = async {
        let wire = Wire::open().await.map_err(|error| error.to_string())?;
        reload_by(&wire, unit).await
    };
    done.await.map_err(|problem| HookError::Unit {
        unit: unit.to_owned(),
        problem,
    })
}

async fn reload_by(wire: &Wire, unit: &str) -> Result<(), String> {
    let rule = format!("type='signal',interface='{INTERFACE}',member='JobRemoved'");
    let rule = OwnedMatchRule::try_from(rule.as_str()).map_err(|error| error.to_string())?;
    // Before the job begins, so that its end is not missed.
    let mut ends = MessageStream::for_match_rule(rule, &wire.connection, Some(QUEUE))
        .await
        .map_err(|error| error.to_string())?;
    wire.call("Subscribe", &())
        .await
        .map_err(|error| explained(&error))?;
    let job: OwnedObjectPath = wire
        .call("ReloadOrTryRestartUnit", &(unit, "replace"))
        .await
        .map_err(|error| explained(&error))?
        .body()
        .deserialize()
        .map_err(|error| error.to_string())?;
    while let Some(message) = ends.next().await {
        let message = message.map_err(|error| error.to_string())?;
        let ended = message.body();
        let ended = ended.deserialize::<(u32, OwnedObjectPath, String, String)>();
        match ended {
            Ok((_, path, _, result)) if path == job => {
                return match result.as_str() {
                    // Skipped: the unit does not run.
                    "done" | "skipped" => Ok(()),
                    result => Err(format!(
                        "its reload ended as {result:?}: journalctl -u {unit} tells more"
                    )),
                };
            }
            _ => {}
        }
    }
    Err("systemd closed the connection before the reload was done".to_owned())
}

fn explained(error: &zbus::Error) -> String {
    let denied = match error {
        zbus::Error::FDO(error) => matches!(
            **error,
            fdo::Error::AccessDenied(_) | fdo::Error::InteractiveAuthorizationRequired(_)
        ),
        _ => false,
    };
    if denied {
        format!(
            "{error}: this agent's user may not manage units; allow it \
             org.freedesktop.systemd1.manage-units for this one with a polkit rule"
        )
    } else {
        error.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use zbus::connection::Builder;

    use super::*;

    const PATH: &str = "/org/freedesktop/systemd1";

    /// A systemd at the other end of a socket pair, whose job ends as `result`; with none, it refuses.
    async fn reloaded(result: Option<&'static str>) -> (Result<(), String>, Vec<String>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let server = Builder::unix_stream(theirs).server(guid).p2p().build();
        let client = Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::join!(server, client);
        let server = server.unwrap();
        let serve = async move {
            let mut calls = Vec::new();
            let mut messages = MessageStream::from(&server);
            let job = |n: u32| OwnedObjectPath::try_from(format!("{PATH}/job/{n}")).unwrap();
            let end = async |n: u32, result: &str| {
                let body = (n, job(n), "x.service", result);
                server
                    .emit_signal(None::<&str>, PATH, INTERFACE, "JobRemoved", &body)
                    .await
                    .unwrap();
            };
            while let Some(Ok(message)) = messages.next().await {
                let header = message.header();
                let Some(method) = header.member().map(ToString::to_string) else {
                    continue;
                };
                calls.push(method.clone());
                match (method.as_str(), result) {
                    ("Subscribe", _) => server.reply(&header, &()).await.unwrap(),
                    (_, None) => {
                        let name = "org.freedesktop.DBus.Error.AccessDenied";
                        server.reply_error(&header, name, &"no").await.unwrap();
                    }
                    (_, Some(result)) => {
                        let asked: (String, String) = message.body().deserialize().unwrap();
                        assert_eq!(asked, ("x.service".to_owned(), "replace".to_owned()));
                        // Another job's end is not this one's.
                        end(1, "failed").await;
                        server.reply(&header, &job(7)).await.unwrap();
                        end(2, "failed").await;
                        end(7, result).await;
                    }
                }
            }
            calls
        };
        let wire = Wire::new(client.unwrap(), false);
        let ask = async move { reload_by(&wire, "x.service").await };
        tokio::join!(ask, serve)
    }

    #[tokio::test]
    async fn the_end_of_the_job_is_the_hooks() {
        for (result, expected) in [
            (Some("done"), None),
            (Some("skipped"), None),
            (Some("failed"), Some("ended as \"failed\"")),
            (Some("timeout"), Some("ended as \"timeout\"")),
            (None, Some("polkit")),
        ] {
            let (told, calls) = reloaded(result).await;
            assert_eq!(calls, ["Subscribe", "ReloadOrTryRestartUnit"]);
            match expected {
                None => assert_eq!(told, Ok(()), "{result:?}"),
                Some(text) => assert!(told.unwrap_err().contains(text), "{result:?}"),
            }
        }
    }
}
