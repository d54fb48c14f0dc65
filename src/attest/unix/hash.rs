//! SHA-256 of executables, each computed once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use rustix::fs::{AtFlags, CWD, StatxFlags, StatxTimestamp, makedev, statx};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::attest::Owner;
use crate::attest::limits::{Turn, Turns};

/// The default limit, in bytes.
const DEFAULT_LIMIT: u64 = 1 << 30;
/// The longest that a caller waits: a network file system must not hold callers for ever.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest that a file is read. Nobody waits so long, but callers ask again.
const READING: Duration = Duration::from_secs(300);
/// Hashes that are remembered. A host runs fewer different programs that ask for SVIDs.
const REMEMBERED: usize = 1024;
/// How much is read at once, in bytes.
const CHUNK: usize = 64 * 1024;

/// The largest file that is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit(Option<u64>);

impl Default for Limit {
    fn default() -> Self {
        Self(Some(DEFAULT_LIMIT))
    }
}

impl Limit {
    /// Reads the configured number: bytes, 0 for the default, -1 for no limit, others are wrong.
    pub(super) fn new(configured: i64) -> Option<Self> {
        match configured {
            0 => Some(Self::default()),
            -1 => Some(Self(None)),
            bytes => u64::try_from(bytes).ok().map(|bytes| Self(Some(bytes))),
        }
    }

    fn admits(self, bytes: u64) -> bool {
        self.0.is_none_or(|limit| bytes <= limit)
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{bytes}"),
            None => f.write_str("-1"),
        }
    }
}

/// Why there is no hash. The attribute stays unset.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum HashError {
    /// The file is larger than `binary_hash_max_size_bytes`.
    #[error("it has {bytes} bytes, more than binary_hash_max_size_bytes ({limit})")]
    TooLarge { bytes: u64, limit: Limit },
    /// The file takes longer to read than callers wait.
    #[error("reading it takes longer than {} s", PATIENCE.as_secs())]
    TooSlow,
    /// Files of the same user that are read for others already.
    #[error("too many programs of this user are being read")]
    TooMany,
    /// The file cannot be read.
    #[error(transparent)]
    Io(Arc<io::Error>),
}

impl From<io::Error> for HashError {
    fn from(source: io::Error) -> Self {
        Self::Io(Arc::new(source))
    }
}

/// What tells one content from another without reading it. An executable cannot be written to
/// while it runs, and every write before changes a time or the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    /// That of the file at `path`, by what the kernel has in memory about it: does not wait for its file
    /// system. `None` where that may not be looked at.
    pub(super) fn cached(path: &Path) -> Option<Self> {
        let (flags, wanted) = (AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS);
        let found = statx(CWD, path, flags, wanted).ok()?;
        let time = |time: StatxTimestamp| (time.tv_sec, i64::from(time.tv_nsec));
        Some(Self {
            device: makedev(found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            size: found.stx_size,
            modified: time(found.stx_mtime),
            changed: time(found.stx_ctime),
        })
    }
}

/// What became of reading a content; `None` while it is read.
type Reading = watch::Receiver<Option<Result<String, HashError>>>;

/// A reading, and the user for whom it was begun.
#[derive(Debug)]
struct Kept {
    reading: Reading,
    user: Option<u32>,
}

/// Hashes files, each content once, however many ask for it at a time.
#[derive(Debug)]
pub(super) struct Hasher {
    limit: Limit,
    readings: Mutex<HashMap<Fingerprint, Kept>>,
    /// A file system that hangs keeps the thread that reads: those of a user are a few.
    turns: Turns,
}

impl Hasher {
    pub(super) fn new(limit: Limit) -> Self {
        Self {
            limit,
            readings: Mutex::new(HashMap::new()),
            turns: Turns::new(),
        }
    }

    pub(super) fn limit(&self) -> Limit {
        self.limit
    }

    /// The hash, if it was computed before.
    pub(super) fn known(&self, fingerprint: Fingerprint) -> Option<String> {
        let readings = self.readings();
        let reading = readings.get(&fingerprint)?.reading.borrow();
        reading.as_ref()?.as_ref().ok().cloned()
    }

    /// The lower-case hex SHA-256 of the file at `path`, read for this owner. A failure is not remembered:
    /// the next caller tries again.
    pub(super) async fn hash(&self, path: PathBuf, owner: Owner) -> Result<String, HashError> {
        let hash = async {
            let turn = self.turns.next(owner).await.ok_or(HashError::TooMany)?;
            let opened = spawn_blocking(move || {
                let file = File::open(path)?;
                // The turn is the thread's, however long that takes.
                fingerprint(&file).map(|fingerprint| (file, fingerprint, turn))
            });
            let (file, fingerprint, turn) = opened.await.map_err(io::Error::other)??;
            self.content(file, fingerprint, owner.user, turn).await
        };
        timeout(PATIENCE, hash)
            .await
            .unwrap_or(Err(HashError::TooSlow))
    }

    /// The hash of an open file that has this fingerprint.
    async fn content(
        &self,
        file: File,
        fingerprint: Fingerprint,
        user: Option<u32>,
        turn: Turn,
    ) -> Result<String, HashError> {
        if !self.limit.admits(fingerprint.size) {
            return Err(HashError::TooLarge {
                bytes: fingerprint.size,
                limit: self.limit,
            });
        }
        let mut reading = self.reading(file, fingerprint, user, turn);
        let ended = reading.wait_for(Option::is_some).await;
        let hash = ended.ok().and_then(|ended| ended.clone());
        hash.unwrap_or_else(|| Err(io::Error::other("reading it ended early").into()))
    }

    /// Reads the file, unless its content was read, or is. It is read to the end even if nobody waits any
    /// more: who asks again then finds the hash.
    fn reading(
        &self,
        file: File,
        fingerprint: Fingerprint,
        user: Option<u32>,
        turn: Turn,
    ) -> Reading {
        let mut readings = self.readings();
        if let Some(kept) = readings.get(&fingerprint)
            && is_of_use(&kept.reading)
        {
            return kept.reading.clone();
        }
        if readings.len() >= REMEMBERED {
            make_room(&mut readings);
        }
        let (hash, reading) = watch::channel(None);
        let kept = Kept {
            reading: reading.clone(),
            user,
        };
        readings.insert(fingerprint, kept);
        let (limit, until) = (self.limit, Instant::now() + READING);
        spawn_blocking(move || {
            hash.send_replace(Some(read(file, limit, until)));
            drop(turn);
        });
        reading
    }

    fn readings(&self) -> std::sync::MutexGuard<'_, HashMap<Fingerprint, Kept>> {
        self.readings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets what failed, and the hashes of the user who has most of them: a program whose times are changed over
/// and over is another one each time, and those of others are not to be read again for that.
fn make_room(readings: &mut HashMap<Fingerprint, Kept>) {
    readings.retain(|_, kept| is_of_use(&kept.reading));
    let mut counts = HashMap::<_, usize>::new();
    for kept in readings.values() {
        *counts.entry(kept.user).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    let Some((greedy, _)) = most else {
        return;
    };
    readings.retain(|_, kept| kept.user != greedy || kept.reading.borrow().is_none());
}

/// Whether there is a hash, or will be.
fn is_of_use(reading: &Reading) -> bool {
    match reading.borrow().as_ref() {
        Some(ended) => ended.is_ok(),
        // Without a sender, its thread ended with it.
        None => reading.has_changed().is_ok(),
    }
}

/// The fingerprint of an open file. May wait for its file system.
fn fingerprint(file: &File) -> io::Result<Fingerprint> {
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok(Fingerprint {
        device: meta.dev(),
        inode: meta.ino(),
        size: meta.size(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changed: (meta.ctime(), meta.ctime_nsec()),
    })
}

fn read(mut file: impl Read, limit: Limit, until: Instant) -> Result<String, HashError> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        if Instant::now() > until {
            return Err(HashError::TooSlow);
        }
        let read = match file.read(&mut chunk) {
            Ok(0) => return Ok(hex::encode(context.finish())),
            Ok(read) => read,
            Err(source) if source.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(source.into()),
        };
        total += read as u64;
        if !limit.admits(total) {
            return Err(HashError::TooLarge {
                bytes: total,
                limit,
            });
        }
        context.update(chunk.get(..read).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::sha256_hex;
    use std::io::Write as _;

    #[test]
    fn limits_are_read() {
        for (configured, written) in [
            (0, Some("1073741824")),
            (1, Some("1")),
            (-1, Some("-1")),
            (-2, None),
            (i64::MIN, None),
            (i64::MAX, Some("9223372036854775807")),
        ] {
            let limit = Limit::new(configured).map(|limit| limit.to_string());
            assert_eq!(limit.as_deref(), written, "{configured}");
        }
    }

    const OWNER: Owner = Owner {
        user: Some(1),
        cgroup: None,
    };

    /// As [`Hasher::hash`], of a file that is open.
    async fn hash_of(
        hasher: &Hasher,
        file: File,
        fingerprint: Fingerprint,
        owner: Owner,
    ) -> Result<String, HashError> {
        let hash = async {
            let turn = hasher.turns.next(owner).await.unwrap();
            hasher.content(file, fingerprint, owner.user, turn).await
        };
        let waited = timeout(PATIENCE, hash).await;
        waited.unwrap_or(Err(HashError::TooSlow))
    }

    async fn hash(hasher: &Hasher, file: File) -> Result<String, HashError> {
        let fingerprint = fingerprint(&file)?;
        hash_of(hasher, file, fingerprint, OWNER).await
    }

    fn file(content: &[u8]) -> (tempfile::NamedTempFile, File) {
        let mut named = tempfile::NamedTempFile::new().unwrap();
        named.write_all(content).unwrap();
        let opened = File::open(named.path()).unwrap();
        (named, opened)
    }

    #[tokio::test]
    async fn the_limit_is_exact() {
        let content = vec![7; CHUNK + 5];
        let size = i64::try_from(content.len()).unwrap();
        let (_kept, opened) = file(&content);
        let hasher = Hasher::new(Limit::new(size).unwrap());
        assert_eq!(hash(&hasher, opened).await.unwrap(), sha256_hex(&content));
        let (_kept, opened) = file(&content);
        let hasher = Hasher::new(Limit::new(size - 1).unwrap());
        let error = hash(&hasher, opened).await.unwrap_err();
        assert!(matches!(error, HashError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_growing_file_does_not_pass_the_limit() {
        let until = Instant::now() + READING;
        let error = read(io::repeat(1), Limit(Some(1 << 20)), until).unwrap_err();
        assert!(matches!(error, HashError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn the_user_with_most_programs_makes_room() {
        let (sender, reading) = watch::channel(Some(Ok("hash".to_owned())));
        let (_hangs, hanging) = watch::channel(None);
        let (_failed, failed) = watch::channel(Some(Err(HashError::TooSlow)));
        let mut readings = HashMap::new();
        let mut keep = |inode: u64, user: u32, reading: &Reading| {
            let kept = Kept {
                reading: reading.clone(),
                user: Some(user),
            };
            readings.insert(fingerprint_of(inode), kept);
        };
        for inode in 0..10 {
            keep(inode, 1, &reading);
        }
        keep(10, 1, &hanging);
        keep(11, 2, &reading);
        for inode in 12..30 {
            keep(inode, 2, &failed);
        }
        make_room(&mut readings);
        let mut left: Vec<_> = readings.keys().map(|key| key.inode).collect();
        left.sort_unstable();
        assert_eq!(left, [10, 11]);
        drop(sender);
    }

    #[test]
    fn reading_has_an_end() {
        let error = read(io::repeat(1), Limit(None), Instant::now()).unwrap_err();
        assert!(matches!(error, HashError::TooSlow), "{error}");
    }

    #[tokio::test]
    async fn one_content_is_read_once() {
        let (named, _opened) = file(b"program");
        let hasher = Arc::new(Hasher::new(Limit::default()));
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (hasher, path) = (Arc::clone(&hasher), named.path().to_owned());
            all.spawn(async move { hasher.hash(path, OWNER).await.unwrap() });
        }
        for hash in all.join_all().await {
            assert_eq!(hash, sha256_hex(b"program"));
        }
        assert_eq!(hasher.readings().len(), 1);
        // What is remembered is used: a planted value comes back.
        let opened = || File::open(named.path()).unwrap();
        let key = fingerprint(&opened()).unwrap();
        assert_eq!(Fingerprint::cached(named.path()), Some(key));
        assert_eq!(hasher.known(key), Some(sha256_hex(b"program")));
        let (_sender, planted) = watch::channel(Some(Ok("planted".to_owned())));
        let planted = Kept {
            reading: planted,
            user: None,
        };
        hasher.readings().insert(key, planted);
        assert_eq!(hash(&hasher, opened()).await.unwrap(), "planted");
    }

    /// A file system that hangs: reading it ends with the writer.
    fn hanging(inode: u64) -> (File, std::io::PipeWriter, Fingerprint) {
        let (reader, writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        (file, writer, fingerprint_of(inode))
    }

    fn fingerprint_of(inode: u64) -> Fingerprint {
        Fingerprint {
            device: 0,
            inode,
            size: 1,
            modified: (0, 0),
            changed: (0, 0),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_file_holds_each_caller_for_its_time_and_nobody_else() {
        let hasher = Arc::new(Hasher::new(Limit::default()));
        let (mut callers, mut writers) = (tokio::task::JoinSet::new(), Vec::new());
        let began = tokio::time::Instant::now();
        // Three processes of one program.
        for _ in 0..3 {
            let (file, writer, fingerprint) = hanging(1);
            writers.push(writer);
            let hasher = Arc::clone(&hasher);
            callers.spawn(async move { hash_of(&hasher, file, fingerprint, OWNER).await });
        }
        let (_kept, opened) = file(b"program");
        let other = hash(&hasher, opened).await;
        assert_eq!(other.unwrap(), sha256_hex(b"program"));
        assert_eq!(
            began.elapsed(),
            Duration::ZERO,
            "nobody waits for strangers"
        );
        // Reading threads keep the paused clock from moving by itself.
        tokio::time::advance(PATIENCE.mul_f64(0.9)).await;
        assert!(callers.try_join_next().is_none());
        tokio::time::advance(PATIENCE.mul_f64(0.2)).await;
        while let Some(ended) = callers.join_next().await {
            assert!(matches!(ended.unwrap(), Err(HashError::TooSlow)));
        }
        assert!(began.elapsed() < PATIENCE * 2, "not one after another");
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_again_finds_the_hash_of_a_slow_file() {
        let hasher = Hasher::new(Limit::default());
        let (file, mut writer, fingerprint) = hanging(1);
        let turn = hasher.turns.next(OWNER).await.unwrap();
        let mut gave_up = hasher.reading(file, fingerprint, OWNER.user, turn);
        assert_eq!(hasher.known(fingerprint), None);
        writer.write_all(b"program").unwrap();
        drop(writer);
        gave_up.changed().await.unwrap();
        assert_eq!(hasher.known(fingerprint), Some(sha256_hex(b"program")));
    }

    #[tokio::test]
    async fn a_failure_is_not_remembered() {
        let hasher = Hasher::new(Limit::default());
        let (named, opened) = file(b"program");
        let fingerprint = fingerprint(&opened).unwrap();
        let unreadable = File::options().write(true).open(named.path()).unwrap();
        let failed = hash_of(&hasher, unreadable, fingerprint, OWNER).await;
        assert!(matches!(failed, Err(HashError::Io(_))), "{failed:?}");
        let read = hash_of(&hasher, opened, fingerprint, OWNER).await;
        assert_eq!(read.unwrap(), sha256_hex(b"program"));
    }

    #[tokio::test(start_paused = true)]
    async fn files_that_hang_take_a_few_threads_of_their_user_only() {
        let hasher = Arc::new(Hasher::new(Limit::default()));
        let (mut callers, mut writers) = (tokio::task::JoinSet::new(), Vec::new());
        for number in 0..100 {
            let (file, writer, fingerprint) = hanging(number);
            writers.push(writer);
            let hasher = Arc::clone(&hasher);
            callers.spawn(async move { hash_of(&hasher, file, fingerprint, OWNER).await });
        }
        // Threads that read keep the paused clock from moving by itself.
        while !callers.is_empty() {
            tokio::time::advance(PATIENCE).await;
            while let Some(ended) = callers.try_join_next() {
                assert!(matches!(ended.unwrap(), Err(HashError::TooSlow)));
            }
        }
        let reading = hasher.readings().len();
        assert!((1..=32).contains(&reading), "{reading}");
        let other = Owner {
            user: Some(2),
            cgroup: None,
        };
        let (named, _opened) = file(b"program");
        let hash = hasher.hash(named.path().to_owned(), other).await;
        assert!(hash.is_ok(), "{hash:?}");
        drop(writers);
        let hash = hasher.hash(named.path().to_owned(), OWNER).await;
        assert!(hash.is_ok(), "threads come back");
    }

    #[tokio::test]
    async fn another_content_is_another_hash() {
        let (mut named, opened) = file(b"one");
        let hasher = Hasher::new(Limit::default());
        assert_eq!(hash(&hasher, opened).await.unwrap(), sha256_hex(b"one"));
        named.write_all(b"two").unwrap();
        let opened = File::open(named.path()).unwrap();
        assert_eq!(hash(&hasher, opened).await.unwrap(), sha256_hex(b"onetwo"));
    }

    #[tokio::test]
    async fn directories_are_not_hashed() {
        let directory = File::open("/proc").unwrap();
        assert!(fingerprint(&directory).is_err());
    }
}
