//! The rotation of an authority: phases, what signs and what is trusted in each, and the schedule.
//!
//! Phases, names and the order are Teleport's (`lib/auth/rotate.go` of 18.0.0):
//!
//! | phase | signs for users and workloads | the listener shows | trusted |
//! |---|---|---|---|
//! | `standby` | the keys | the keys | the keys |
//! | `init` | old keys | old | old and new |
//! | `update_clients` | new keys | old | both |
//! | `update_servers` | new keys | new | both |
//! | `rollback` | old keys | old | both |
//!
//! After the last phase, and after a rollback, only one set is left.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::{Authority, AuthorityError, KeySet, TlsAuthority};
use crate::crypto::PrivateKey;
use crate::embedded::store::StoreError;
use crate::pb::types as wire;

/// The grace period without another choice, as `tctl auth rotate` has it.
pub const GRACE: Duration = Duration::from_hours(30);

/// A phase of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is being rotated.
    Standby,
    /// The new keys are there and trusted.
    Init,
    /// The new keys sign for users and workloads.
    UpdateClients,
    /// The new keys sign for servers too.
    UpdateServers,
    /// The old keys sign again, the new ones are still trusted.
    Rollback,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 5] = [
        Self::Standby,
        Self::Init,
        Self::UpdateClients,
        Self::UpdateServers,
        Self::Rollback,
    ];

    /// The wire's name, for example `update_clients`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Init => "init",
            Self::UpdateClients => "update_clients",
            Self::UpdateServers => "update_servers",
            Self::Rollback => "rollback",
        }
    }

    /// The phase of a wire name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }

    /// The phases that may come after this one; the first is the way forward.
    #[must_use]
    pub fn following(self) -> &'static [Self] {
        match self {
            Self::Standby => &[Self::Init],
            Self::Init => &[Self::UpdateClients, Self::Rollback],
            Self::UpdateClients => &[Self::UpdateServers, Self::Rollback],
            Self::UpdateServers => &[Self::Standby, Self::Rollback],
            Self::Rollback => &[Self::Standby],
        }
    }
}

/// Who moves a rotation from phase to phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Somebody with a command.
    Manual,
    /// The schedule: a third of the grace period for each phase.
    Auto,
}

impl Mode {
    /// The wire's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Auto => "auto",
        }
    }
}

/// One step of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The phase to be in afterwards.
    pub to: Phase,
    /// Who takes the step.
    pub mode: Mode,
    /// How long a scheduled rotation takes; counts for [`Phase::Init`] only. With none, a
    /// scheduled rotation is over at once, and whoever has an old certificate has to join anew.
    pub grace: Duration,
}

/// Why a rotation does not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// That phase cannot come now.
    #[error(
        "the {kind} authority is in phase {from}, from which it cannot go to {to} (possible: \
         {possible})"
    )]
    Order {
        /// The authority's type.
        kind: &'static str,
        /// Its phase.
        from: &'static str,
        /// The phase that was asked for.
        to: &'static str,
        /// The phases that may come.
        possible: String,
    },
    /// No new keys could be made, or the stored ones are damaged.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The store failed; nothing has changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Authority {
    /// The phase that the authority is in.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let rotation = self.rotation.as_ref();
        rotation
            .and_then(|rotation| Phase::from_name(&rotation.phase))
            .unwrap_or(Phase::Standby)
    }

    /// The TLS authority that signs for the cluster's own servers.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`] if there is none.
    pub fn server_signer(&self) -> Result<&TlsAuthority, AuthorityError> {
        match (self.phase(), self.additional.tls.first()) {
            (Phase::UpdateClients, Some(old)) => Ok(old),
            _ => self.signer(),
        }
    }

    /// The SSH key that signs for the cluster's own servers.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`] if there is none.
    pub fn server_ssh_signer(&self) -> Result<&PrivateKey, AuthorityError> {
        match (self.phase(), self.additional.ssh.first()) {
            (Phase::UpdateClients, Some(old)) => Ok(old),
            _ => self.ssh_signer(),
        }
    }

    /// When a scheduled rotation takes which step next.
    #[must_use]
    pub fn due(&self) -> Option<(SystemTime, Phase)> {
        let rotation = self.rotation.as_ref()?;
        let schedule = rotation.schedule.as_ref()?;
        if rotation.mode != Mode::Auto.name() {
            return None;
        }
        let (at, next) = match self.phase() {
            Phase::Init => (schedule.update_clients, Phase::UpdateClients),
            Phase::UpdateClients => (schedule.update_servers, Phase::UpdateServers),
            Phase::UpdateServers => (schedule.standby, Phase::Standby),
            Phase::Standby | Phase::Rollback => return None,
        };
        Some((SystemTime::try_from(at?).ok()?, next))
    }

    /// The authority after `step`. `new` are the keys that [`Phase::Init`] brings.
    ///
    /// # Errors
    /// [`RotationError::Order`].
    pub(super) fn after(
        mut self,
        step: Step,
        new: KeySet,
        now: SystemTime,
    ) -> Result<Self, RotationError> {
        let from = self.phase();
        let possible = from.following();
        if !possible.contains(&step.to) {
            let possible: Vec<_> = possible.iter().map(|phase| phase.name()).collect();
            return Err(RotationError::Order {
                kind: self.kind.name(),
                from: from.name(),
                to: step.to.name(),
                possible: possible.join(", "),
            });
        }
        let mut rotation = self.rotation.take().unwrap_or_default();
        match (from, step.to) {
            (_, Phase::Init) => {
                self.additional = new;
                let time = |thirds: u32| Some((now + step.grace / 3 * thirds).into());
                rotation = wire::Rotation {
                    current_id: Uuid::new_v4().to_string(),
                    started: time(0),
                    grace_period: i64::try_from(step.grace.as_nanos()).unwrap_or(i64::MAX),
                    last_rotated: rotation.last_rotated,
                    schedule: (step.mode == Mode::Auto).then(|| wire::RotationSchedule {
                        update_clients: time(1),
                        update_servers: time(2),
                        standby: time(3),
                    }),
                    ..wire::Rotation::default()
                };
            }
            // The new keys have not signed anything yet, so the old ones are in their place.
            (Phase::Init, Phase::Rollback) => {}
            (_, Phase::UpdateClients | Phase::Rollback) => {
                std::mem::swap(&mut self.active, &mut self.additional);
            }
            (_, Phase::UpdateServers) => {}
            (_, Phase::Standby) => {
                self.additional = KeySet::default();
                if from != Phase::Rollback {
                    rotation.last_rotated = rotation.started;
                }
            }
        }
        let state = match step.to {
            Phase::Standby => "standby",
            _ => "in_progress",
        };
        step.to.name().clone_into(&mut rotation.phase);
        step.mode.name().clone_into(&mut rotation.mode);
        state.clone_into(&mut rotation.state);
        if step.to == Phase::Standby || step.mode == Mode::Manual {
            rotation.schedule = None;
        }
        self.rotation = Some(rotation);
        self.changed = Some(now);
        Ok(self)
    }
}

/// Where a rotation stands, in a few words for people.
#[must_use]
pub fn describe(authority: &Authority) -> String {
    let time = |at: Option<prost_types::Timestamp>| {
        at.and_then(crate::embedded::instant::from_wire)
            .map(crate::embedded::instant::rfc3339)
    };
    let rotation = authority.rotation.clone().unwrap_or_default();
    let doing = match authority.phase() {
        Phase::Standby => {
            return time(rotation.last_rotated)
                .map_or_else(|| "never updated".to_owned(), |at| format!("rotated {at}"));
        }
        Phase::Init => "initialized",
        Phase::UpdateClients => "rotating clients",
        Phase::UpdateServers => "rotating servers",
        Phase::Rollback => "rolling back",
    };
    let started = time(rotation.started).unwrap_or_default();
    let ending = time(rotation.schedule.and_then(|schedule| schedule.standby))
        .map(|at| format!(", ending: {at}"))
        .unwrap_or_default();
    format!(
        "{doing} (mode: {}, started: {started}{ending})",
        rotation.mode
    )
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::crypto::Suite;
    use crate::embedded::ca::AuthorityType;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_hours(500_000)
    }

    fn step(to: Phase) -> Step {
        Step {
            to,
            mode: Mode::Manual,
            grace: GRACE,
        }
    }

    fn authority() -> Authority {
        Authority::make(AuthorityType::User, "c", Suite::BalancedV1, now()).unwrap()
    }

    /// The TLS certificate that signs for users, the one for servers, and all that are trusted.
    fn keys(authority: &Authority) -> (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) {
        let of = |tls: &TlsAuthority| tls.certificate.clone();
        (
            of(authority.signer().unwrap()),
            of(authority.server_signer().unwrap()),
            authority.trusted_tls().map(of).collect(),
        )
    }

    #[test]
    fn each_phase_signs_and_trusts_as_a_real_cluster() {
        use Phase::{Init, Rollback, Standby, UpdateClients, UpdateServers};
        let (first, second) = (authority(), authority());
        let old = keys(&first).0;
        let new = keys(&second).0;
        let both = |a: &Vec<u8>, b: &Vec<u8>| vec![a.clone(), b.clone()];
        for path in [
            vec![
                (Init, &old, &old, both(&old, &new)),
                (UpdateClients, &new, &old, both(&new, &old)),
                (UpdateServers, &new, &new, both(&new, &old)),
                (Standby, &new, &new, vec![new.clone()]),
            ],
            vec![
                (Init, &old, &old, both(&old, &new)),
                (Rollback, &old, &old, both(&old, &new)),
                (Standby, &old, &old, vec![old.clone()]),
            ],
            vec![
                (Init, &old, &old, both(&old, &new)),
                (UpdateClients, &new, &old, both(&new, &old)),
                (Rollback, &old, &old, both(&old, &new)),
                (Standby, &old, &old, vec![old.clone()]),
            ],
            vec![
                (Init, &old, &old, both(&old, &new)),
                (UpdateClients, &new, &old, both(&new, &old)),
                (UpdateServers, &new, &new, both(&new, &old)),
                (Rollback, &old, &old, both(&old, &new)),
                (Standby, &old, &old, vec![old.clone()]),
            ],
        ] {
            let mut current = first.clone();
            for (to, users, servers, trusted) in path {
                current = current
                    .after(step(to), second.active.clone(), now())
                    .unwrap();
                let expected = (users.clone(), servers.clone(), trusted);
                assert!(keys(&current) == expected, "{to:?}");
                let rotation = current.rotation.as_ref().unwrap();
                let busy = if to == Standby {
                    "standby"
                } else {
                    "in_progress"
                };
                assert_eq!(
                    (rotation.state.as_str(), rotation.phase.as_str()),
                    (busy, to.name())
                );
                // Nothing of it is lost by a restart.
                let read = Authority::from_resource(&current.to_resource()).unwrap();
                assert_eq!(read.message("c"), current.message("c"));
                assert!(keys(&read) == keys(&current));
            }
        }
    }

    #[test]
    fn only_the_next_phase_or_a_rollback_may_come() {
        let mut current = authority();
        let mut seen = 0;
        for phase in [
            Phase::Standby,
            Phase::Init,
            Phase::UpdateClients,
            Phase::UpdateServers,
        ] {
            assert_eq!(current.phase(), phase);
            for to in Phase::ALL {
                let result = current.clone().after(step(to), KeySet::default(), now());
                assert_eq!(
                    result.is_ok(),
                    phase.following().contains(&to),
                    "{phase:?} {to:?}"
                );
                seen += usize::from(result.is_err());
            }
            let next = phase.following()[0];
            current = current
                .after(step(next), authority().active, now())
                .unwrap();
        }
        assert_eq!(seen, 20 - 7);
        let error = current.after(step(Phase::Rollback), KeySet::default(), now());
        assert_eq!(
            error.unwrap_err().to_string(),
            "the user authority is in phase standby, from which it cannot go to rollback \
             (possible: init)"
        );
    }

    #[test]
    fn a_schedule_takes_a_third_of_the_grace_period_for_each_phase() {
        let auto = |to| Step {
            mode: Mode::Auto,
            ..step(to)
        };
        let hours = Duration::from_hours;
        let begun = authority()
            .after(auto(Phase::Init), authority().active, now())
            .unwrap();
        assert_eq!(begun.due(), Some((now() + hours(10), Phase::UpdateClients)));
        assert!(
            describe(&begun)
                .starts_with("initialized (mode: auto, started: 2027-01-15T08:00:00Z, ending:"),
            "{}",
            describe(&begun)
        );
        let next = begun
            .clone()
            .after(auto(Phase::UpdateClients), KeySet::default(), now());
        assert_eq!(
            next.unwrap().due(),
            Some((now() + hours(20), Phase::UpdateServers))
        );
        // Whoever rolls back takes it into their own hands.
        let back = begun
            .after(step(Phase::Rollback), KeySet::default(), now())
            .unwrap();
        assert_eq!(back.due(), None);
        let over = back
            .after(step(Phase::Standby), KeySet::default(), now())
            .unwrap();
        assert_eq!(describe(&over), "never updated");
    }
}
