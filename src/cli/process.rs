//! What a long-running command asks of the kernel for itself before it does anything else.

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::clear_ambient_capability_set;

/// Keeps the keys in this process's memory and its capabilities to itself, and lets it hold as many connections as the
/// machine allows. Runs before there are other threads: capabilities are each thread's own.
///
/// Not dumpable means: no core file, whatever `core_pattern` pipes to, and no other process of the
/// same user reads the memory (`PR_SET_DUMPABLE`). It also closes `/proc/<pid>/exe` to agents that
/// attest this process without privileges, so commands that are themselves workloads
/// (`spiffe-inspect`) do not call this. A process may always look at itself, as `quickstart` does,
/// and what it executes starts dumpable again.
pub(super) fn protect() {
    // What a unit gives the agent (`AmbientCapabilities=`) is not for the programs that it starts.
    if let Err(error) = clear_ambient_capability_set() {
        tracing::debug!(%error, "Programs that this one starts may keep its capabilities");
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "Other processes of this user can read this one's memory");
    }
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "Core files cannot be turned off");
    }
    let files = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: files.maximum,
        ..files
    };
    if files.current != raised.current
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%error, "The limit of open files cannot be raised");
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::dumpable_behavior;

    use super::*;

    #[test]
    fn nobody_reads_the_memory_and_this_process_still_knows_itself() {
        protect();
        protect();
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
        let files = getrlimit(Resource::Nofile);
        assert_eq!(files.current, files.maximum);
        assert!(std::fs::read("/proc/self/exe").is_ok());
        assert!(std::fs::read_dir("/proc/self/fd").is_ok());
    }
}
