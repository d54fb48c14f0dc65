//! `/proc/<pid>/status` (`proc_pid_status(5)`).

/// Effective IDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The effective user and group: the second number of the `Uid:` and `Gid:` lines (real,
/// effective, saved, file system). A line with one number gives that one.
pub(super) fn effective_ids(status: &str) -> Option<Ids> {
    let id = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        let mut numbers = line.split_ascii_whitespace();
        let real = numbers.next()?;
        numbers.next().unwrap_or(real).parse().ok()
    };
    Some(Ids {
        uid: id("Uid:")?,
        gid: id("Gid:")?,
    })
}

/// Status files of real processes.
#[cfg(test)]
pub(super) mod fixture {
    /// A web server's worker (Debian 12, Linux 6.1).
    pub(in super::super) const SERVICE: &str = "Name:\tnginx\nUmask:\t0022\nState:\tS (sleeping)\n\
        Tgid:\t812\nNgid:\t0\nPid:\t812\nPPid:\t811\nTracerPid:\t0\nUid:\t33\t33\t33\t33\n\
        Gid:\t33\t33\t33\t33\nFDSize:\t128\nGroups:\t33 \nNStgid:\t812\nNSpid:\t812\nThreads:\t1\n";
    /// `passwd` started by user 1000: a set-user-ID program.
    pub(in super::super) const SETUID: &str = "Name:\tpasswd\nUmask:\t0002\nState:\tS (sleeping)\n\
        Tgid:\t4711\nPid:\t4711\nUid:\t1000\t0\t0\t0\nGid:\t1000\t1000\t1000\t1000\nGroups:\t4 24 1000 \n";
    /// A process whose name imitates a line: the kernel writes the newline as `\n`, two characters.
    pub(in super::super) const LYING: &str = "Name:\tx\\nUid:\t0\nUmask:\t0022\nState:\tR (running)\n\
        Uid:\t1000\t1000\t1000\t1000\nGid:\t1001\t1002\t1001\t1001\n";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_ids_count() {
        for (status, uid, gid) in [
            (fixture::SERVICE, 33, 33),
            (fixture::SETUID, 0, 1000),
            (fixture::LYING, 1000, 1002),
            ("Uid:\t7\nGid:\t8\n", 7, 8),
            ("Uid: 4294967295 4294967294\nGid: 0 0\n", 4_294_967_294, 0),
        ] {
            assert_eq!(effective_ids(status), Some(Ids { uid, gid }), "{status}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for status in [
            "",
            "Uid:\nGid:\n",
            "Uid:\t1 2\n",
            "Gid:\t1 2\n",
            "Uid:\tx y\nGid:\t1\n",
            "Uid:\t1 4294967296\nGid:\t1\n",
            "Uid:\t1 -1\nGid:\t1\n",
        ] {
            assert_eq!(effective_ids(status), None, "{status:?}");
        }
    }

    #[test]
    fn fuzz_statuses() {
        let check = bolero::check!().with_type::<(String, [u32; 4])>();
        check.for_each(|(name, [real, uid, gid, other])| {
            // The kernel writes a newline in a name as two characters.
            let shown = name.replace('\n', "\\n").replace('\r', "\\r");
            let status = format!(
                "Name:\t{shown}\nUid:\t{real}\t{uid}\t{other}\t{other}\nGid:\t{real}\t{gid}\t{other}\t{other}\n"
            );
            let ids = Ids {
                uid: *uid,
                gid: *gid,
            };
            assert_eq!(effective_ids(&status), Some(ids), "{status:?}");
            let _noise = effective_ids(name);
        });
    }
}
