//! Speaks with systemd's manager: asks it which unit a process belongs to.

use std::time::Duration;

use tokio::sync::Mutex;
use zbus::connection::Builder;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, Fd, fdo};

use super::unit::{self, UnitError};
use crate::attest::Peer;

/// The longest a question may take, connecting included.
const PATIENCE: Duration = Duration::from_secs(30);
/// systemd's own socket, which works without a bus but for root only.
const PRIVATE: &str = "unix:path=/run/systemd/private";
const BUS_NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
pub(crate) const INTERFACE: &str = "org.freedesktop.systemd1.Manager";

/// Why systemd did not name a service.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemdError {
    /// Neither the system bus nor systemd's own socket can be reached.
    #[error(
        "cannot reach systemd: {bus} (system bus); {private} ({PRIVATE}): is this host booted \
         with systemd, and does dbus run?"
    )]
    Unreachable {
        /// What the system bus said.
        bus: zbus::Error,
        /// What the private socket said.
        private: zbus::Error,
    },
    /// systemd answered with an error; a process outside of every unit is one.
    #[error("systemd: {0}")]
    Call(#[source] zbus::Error),
    /// The unit is no service.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// No answer in time.
    #[error("systemd did not answer within {} s", PATIENCE.as_secs())]
    TooSlow,
}

/// A connection to systemd, made when it is needed and remade when it broke.
#[derive(Debug, Default)]
pub(super) struct Manager {
    link: Mutex<Option<Link>>,
}

/// A way to systemd's manager.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) connection: Connection,
    /// Whether messages pass a bus, which wants to know the recipient.
    bus: bool,
}

#[derive(Debug, Clone)]
struct Link {
    wire: Wire,
    /// Whether systemd has `GetUnitByPIDFD` (253 and later) and lets us call it.
    by_pidfd: bool,
}

impl Manager {
    /// The name of the service that `peer` belongs to, without `.service`.
    pub(super) async fn service_of(&self, peer: &Peer) -> Result<String, SystemdError> {
        tokio::time::timeout(PATIENCE, self.ask(peer))
            .await
            .map_err(|_elapsed| SystemdError::TooSlow)?
    }

    async fn ask(&self, peer: &Peer) -> Result<String, SystemdError> {
        let kept = self.link.lock().await.clone();
        if let Some(mut link) = kept {
            match link.service_of(peer).await {
                // A kept connection may have ended with the bus: a new one decides.
                Err(SystemdError::Call(error)) if is_link_failure(&error) => {
                    tracing::debug!(%error, "Connecting to systemd again");
                }
                answer => {
                    self.keep(link).await;
                    return answer;
                }
            }
        }
        let mut link = Link::new(Wire::open().await?);
        let answer = link.service_of(peer).await;
        match &answer {
            Err(SystemdError::Call(error)) if is_link_failure(error) => {
                *self.link.lock().await = None;
            }
            _ => self.keep(link).await,
        }
        answer
    }

    async fn keep(&self, link: Link) {
        *self.link.lock().await = Some(link);
    }
}

impl Wire {
    /// By the system bus, or by systemd's own socket where there is none.
    pub(crate) async fn open() -> Result<Self, SystemdError> {
        match Builder::system().build().await {
            Ok(connection) => Ok(Self::new(connection, true)),
            Err(bus) => match Builder::address(PRIVATE).p2p().build().await {
                Ok(connection) => Ok(Self::new(connection, false)),
                Err(private) => Err(SystemdError::Unreachable { bus, private }),
            },
        }
    }

    pub(crate) fn new(connection: Connection, bus: bool) -> Self {
        Self { connection, bus }
    }

    /// Calls a method of the manager.
    pub(crate) async fn call<B>(
        &self,
        method: &'static str,
        body: &B,
    ) -> zbus::Result<zbus::Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let name = self.bus.then_some(BUS_NAME);
        self.connection
            .call_method(name, PATH, Some(INTERFACE), method, body)
            .await
    }
}

impl Link {
    fn new(wire: Wire) -> Self {
        Self {
            wire,
            by_pidfd: true,
        }
    }

    async fn service_of(&mut self, peer: &Peer) -> Result<String, SystemdError> {
        if self.by_pidfd {
            let answer = self
                .wire
                .call("GetUnitByPIDFD", &(Fd::from(peer.pidfd()),))
                .await;
            match answer.map(|message| {
                message
                    .body()
                    .deserialize::<(OwnedObjectPath, String, Vec<u8>)>()
            }) {
                Ok(Ok((_, unit, _))) => return Ok(unit::service_of_unit(&unit)?),
                Err(error) if is_absent(&error) => self.by_pidfd = false,
                Ok(Err(error)) | Err(error) => return Err(SystemdError::Call(error)),
            }
        }
        let pid = u32::try_from(peer.pid()).unwrap_or_default();
        let answer = self
            .wire
            .call("GetUnitByPID", &(pid,))
            .await
            .map_err(SystemdError::Call)?;
        let path: OwnedObjectPath = answer.body().deserialize().map_err(SystemdError::Call)?;
        Ok(unit::service_of_path(path.as_str())?)
    }
}

/// Whether systemd, or the bus's policy, does not offer a method.
fn is_absent(error: &zbus::Error) -> bool {
    match error {
        zbus::Error::FDO(error) => matches!(
            **error,
            fdo::Error::UnknownMethod(_)
                | fdo::Error::AccessDenied(_)
                | fdo::Error::NotSupported(_)
        ),
        _ => false,
    }
}

/// Whether the connection is to blame, rather than systemd's answer.
fn is_link_failure(error: &zbus::Error) -> bool {
    match error {
        zbus::Error::MethodError(..) => false,
        zbus::Error::FDO(error) => matches!(
            **error,
            fdo::Error::Disconnected(_)
                | fdo::Error::NoReply(_)
                | fdo::Error::ServiceUnknown(_)
                | fdo::Error::NameHasNoOwner(_)
                | fdo::Error::ZBus(_)
        ),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use std::os::unix::net::UnixStream;

    /// What a fake systemd says.
    #[derive(Clone, Copy)]
    enum Says {
        Unit(&'static str),
        NoUnit,
    }

    /// A systemd at the other end of a socket pair; with or without `GetUnitByPIDFD`.
    async fn systemd(pidfd: bool, says: Says) -> (Link, impl Future<Output = Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let server = Builder::unix_stream(theirs).server(guid).p2p().build();
        let client = Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::join!(server, client);
        let server = server.unwrap();
        let serve = async move {
            let mut calls = Vec::new();
            let mut messages = zbus::MessageStream::from(&server);
            while let Some(Ok(message)) = messages.next().await {
                let header = message.header();
                let method = header.member().unwrap().to_string();
                calls.push(method.clone());
                let path = |unit: &str| {
                    let escaped = unit.replace('.', "_2e").replace('@', "_40");
                    OwnedObjectPath::try_from(format!("{PATH}/unit/{escaped}")).unwrap()
                };
                let answered = match (method.as_str(), says) {
                    ("GetUnitByPIDFD", _) if !pidfd => {
                        let name = "org.freedesktop.DBus.Error.UnknownMethod";
                        server.reply_error(&header, name, &"no such method").await
                    }
                    ("GetUnitByPIDFD", Says::Unit(unit)) => {
                        server
                            .reply(&header, &(path(unit), unit, vec![0_u8; 16]))
                            .await
                    }
                    ("GetUnitByPID", Says::Unit(unit)) => {
                        let pid: u32 = message.body().deserialize().unwrap();
                        assert_eq!(pid, std::process::id());
                        server.reply(&header, &path(unit)).await
                    }
                    _ => {
                        let name = "org.freedesktop.systemd1.NoUnitForPID";
                        server.reply_error(&header, name, &"no unit").await
                    }
                };
                answered.unwrap();
            }
            calls
        };
        (Link::new(Wire::new(client.unwrap(), false)), serve)
    }

    /// Asks twice over one connection, and gives the answers and the calls they took.
    async fn asked(pidfd: bool, says: Says) -> (Vec<Result<String, String>>, Vec<String>) {
        let pid = i32::try_from(std::process::id()).unwrap();
        let peer = Peer::open(pid, 0, 0).unwrap();
        let (mut link, serve) = systemd(pidfd, says).await;
        let ask = async move {
            let mut answers = Vec::new();
            for _ in 0..2 {
                answers.push(link.service_of(&peer).await.map_err(|e| e.to_string()));
            }
            answers
        };
        tokio::join!(ask, serve)
    }

    #[tokio::test]
    async fn the_pidfd_is_asked_for_where_that_is_possible() {
        let (answers, calls) = asked(true, Says::Unit("worker@1.service")).await;
        assert_eq!(answers, [Ok("worker@1".into()), Ok("worker@1".into())]);
        assert_eq!(calls, ["GetUnitByPIDFD", "GetUnitByPIDFD"]);
    }

    #[tokio::test]
    async fn older_systemds_are_asked_by_process_id() {
        let (answers, calls) = asked(false, Says::Unit("worker@1.service")).await;
        assert_eq!(answers, [Ok("worker@1".into()), Ok("worker@1".into())]);
        assert_eq!(calls, ["GetUnitByPIDFD", "GetUnitByPID", "GetUnitByPID"]);
    }

    #[tokio::test]
    async fn a_caller_that_is_no_service_is_an_error() {
        for pidfd in [true, false] {
            let (answers, _) = asked(pidfd, Says::Unit("session.scope")).await;
            let error = answers.into_iter().next().unwrap().unwrap_err();
            assert_eq!(error, "its unit session.scope is not a service");
            let (answers, _) = asked(pidfd, Says::NoUnit).await;
            let error = answers.into_iter().next().unwrap().unwrap_err();
            assert!(error.contains("no unit"), "{error}");
        }
    }

    #[test]
    fn answers_do_not_cost_the_connection() {
        let fdo = |error| zbus::Error::FDO(Box::new(error));
        assert!(!is_link_failure(&fdo(fdo::Error::AccessDenied(
            String::new()
        ))));
        assert!(is_link_failure(&fdo(fdo::Error::Disconnected(
            String::new()
        ))));
        assert!(is_link_failure(&zbus::Error::InvalidReply));
    }
}
