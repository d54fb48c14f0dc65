//! Whose tokens are kept, within what memory each user of the machine may take.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use super::Slot;
use crate::attest::{Attested, Process};
use crate::workload::turns::User;

/// The most bytes that are kept for one user, and for all.
pub(super) const OF_USER: usize = 4 * 1024 * 1024;
pub(super) const OF_ALL: usize = 16 * 1024 * 1024;
/// Audience sets that are kept for one workload.
pub(super) const PER_WORKLOAD: usize = 64;

/// Slots by user and workload. Beyond the limits, what was not asked for longest goes first: who
/// wants it again asks the cluster again.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<User, Share>);

/// What one user has.
#[derive(Debug, Default)]
struct Share {
    bytes: usize,
    /// By the digest of who asked.
    workloads: HashMap<[u8; 32], Workload>,
}

#[derive(Debug)]
struct Workload {
    process: Option<Process>,
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    slot: Arc<Slot>,
    /// What the slot was when it was weighed last.
    bytes: usize,
}

impl Table {
    pub(super) fn get(&self, whose: &Attested, audiences: &[String]) -> Option<Arc<Slot>> {
        let share = self.0.get(&whose.user())?;
        let mut kept = share.workloads.get(&whose.digest())?.kept.iter();
        kept.find(|kept| kept.slot.audiences == audiences)
            .map(|kept| Arc::clone(&kept.slot))
    }

    /// Adds a slot, unless somebody else just did.
    pub(super) fn add(&mut self, whose: &Attested, slot: Slot) -> Arc<Slot> {
        if let Some(known) = self.get(whose, &slot.audiences) {
            return known;
        }
        let slot = Arc::new(slot);
        let share = self.0.entry(whose.user()).or_default();
        let workload = share.workloads.entry(whose.digest());
        let workload = workload.or_insert_with(|| Workload {
            process: whose.process(),
            kept: Vec::new(),
        });
        if workload.kept.len() >= PER_WORKLOAD {
            let idle = workload.kept.iter().enumerate();
            let idle = idle.min_by_key(|(_, kept)| kept.slot.used());
            if let Some(at) = idle.map(|(at, _)| at) {
                share.bytes -= workload.kept.swap_remove(at).bytes;
            }
        }
        workload.kept.push(Kept {
            slot: Arc::clone(&slot),
            bytes: 0,
        });
        self.weigh(whose, &slot);
        slot
    }

    /// Counts what a slot holds now, if it is still there, and makes room for it.
    pub(super) fn weigh(&mut self, whose: &Attested, slot: &Arc<Slot>) {
        let Some(share) = self.0.get_mut(&whose.user()) else {
            return;
        };
        let workload = share.workloads.get_mut(&whose.digest());
        let kept = workload.and_then(|workload| {
            let mut all = workload.kept.iter_mut();
            all.find(|kept| Arc::ptr_eq(&kept.slot, slot))
        });
        let Some(kept) = kept else {
            return;
        };
        let bytes = slot.bytes();
        share.bytes = share.bytes - kept.bytes + bytes;
        kept.bytes = bytes;
        if share.bytes > OF_USER {
            share.shrink(OF_USER);
        }
        while self.bytes() > OF_ALL {
            let Some(largest) = self.0.values_mut().max_by_key(|share| share.bytes) else {
                return;
            };
            largest.shrink(largest.bytes);
        }
    }

    /// Takes away what a workload holds, whatever for.
    pub(super) fn withdraw(&mut self, whose: &Attested) {
        let Some(share) = self.0.get_mut(&whose.user()) else {
            return;
        };
        let workload = share.workloads.get_mut(&whose.digest());
        for kept in workload.into_iter().flat_map(|workload| &mut workload.kept) {
            kept.slot.state().held = None;
            kept.bytes = kept.slot.bytes();
        }
        share.bytes = share.kept().map(|kept| kept.bytes).sum();
    }

    /// Forgets what was not used since `idle`, and what is for processes that `ended`.
    pub(super) fn sweep(&mut self, idle: SystemTime, ended: &HashSet<Process>) {
        self.0.retain(|_, share| {
            share.workloads.retain(|_, workload| {
                workload
                    .process
                    .is_none_or(|process| !ended.contains(&process))
            });
            share.retain(|slot| slot.used() > idle);
            !share.workloads.is_empty()
        });
    }

    /// The processes for which something is kept.
    pub(super) fn processes(&self) -> Vec<Process> {
        let workloads = self.0.values().flat_map(|share| share.workloads.values());
        workloads.filter_map(|workload| workload.process).collect()
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.0.values().flat_map(Share::kept).map(|kept| &kept.slot)
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.values().map(|share| share.bytes).sum()
    }

    /// How many audience sets of how many workloads are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> (usize, usize) {
        let workloads = self.0.values().map(|share| share.workloads.len());
        (self.slots().count(), workloads.sum())
    }
}

impl Share {
    fn kept(&self) -> impl Iterator<Item = &Kept> {
        let workloads = self.workloads.values();
        workloads.flat_map(|workload| &workload.kept)
    }

    /// Drops what was not asked for longest, to seven eighths of `bytes`: that this is done seldom.
    fn shrink(&mut self, bytes: usize) {
        let used = |kept: &Kept| (kept.slot.used(), kept.bytes);
        let mut all: Vec<(SystemTime, usize)> = self.kept().map(used).collect();
        all.sort_unstable();
        let mut surplus = self.bytes.saturating_sub(bytes - bytes / 8);
        let last = all.into_iter().find(|(_, bytes)| {
            surplus = surplus.saturating_sub(*bytes);
            surplus == 0
        });
        self.retain(|slot| last.is_some_and(|(last, _)| slot.used() > last));
    }

    fn retain(&mut self, keep: impl Fn(&Slot) -> bool) {
        self.workloads.retain(|_, workload| {
            workload.kept.retain(|kept| keep(&kept.slot));
            !workload.kept.is_empty()
        });
        self.bytes = self.kept().map(|kept| kept.bytes).sum();
    }
}
