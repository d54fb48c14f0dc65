//! SHA-256 of executables, each computed once.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use rustix::fs::{AtFlags, CWD, StatxFlags, StatxTimestamp, makedev, statx};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::timeout;

/// The default limit, in bytes.
const DEFAULT_LIMIT: u64 = 1 << 30;
/// The longest that a caller waits: a network file system must not hold callers for ever.
const PATIENCE: Duration = Duration::from_secs(15);
/// Hashes that are remembered. A host runs fewer different programs that ask for SVIDs.
const REMEMBERED: usize = 1024;
/// Files that are read at a time. A read from a file system that hangs keeps its thread, and threads
/// are for other work too.
const READERS: usize = 32;
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
#[derive(Debug, thiserror::Error)]
pub(super) enum HashError {
    /// The file is larger than `binary_hash_max_size_bytes`.
    #[error("it has {bytes} bytes, more than binary_hash_max_size_bytes ({limit})")]
    TooLarge { bytes: u64, limit: Limit },
    /// The file took longer to read than [`PATIENCE`].
    #[error("reading it takes longer than {} s", PATIENCE.as_secs())]
    TooSlow,
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
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

type Slot = Arc<OnceCell<String>>;

/// Hashes files, each content once, however many ask for it at a time.
#[derive(Debug)]
pub(super) struct Hasher {
    limit: Limit,
    known: Mutex<HashMap<Fingerprint, Slot>>,
    readers: Arc<Semaphore>,
}

impl Hasher {
    pub(super) fn new(limit: Limit) -> Self {
        Self {
            limit,
            known: Mutex::new(HashMap::new()),
            readers: Arc::new(Semaphore::new(READERS)),
        }
    }

    pub(super) fn limit(&self) -> Limit {
        self.limit
    }

    /// The lower-case hex SHA-256 of a file opened for reading, which has this fingerprint.
    pub(super) async fn hash(
        &self,
        file: File,
        fingerprint: Fingerprint,
    ) -> Result<String, HashError> {
        if !self.limit.admits(fingerprint.size) {
            return Err(HashError::TooLarge {
                bytes: fingerprint.size,
                limit: self.limit,
            });
        }
        // A failure is not remembered: the next caller tries again, for what is left of its time.
        let slot = self.slot(fingerprint);
        let hash = slot.get_or_try_init(|| self.computed(file));
        let hash = timeout(PATIENCE, hash).await;
        hash.map_err(|_elapsed| HashError::TooSlow)?.cloned()
    }

    async fn computed(&self, file: File) -> Result<String, HashError> {
        let reader = Arc::clone(&self.readers).acquire_owned().await;
        let stop = Stop(Arc::new(AtomicBool::new(false)));
        let (flag, limit) = (Arc::clone(&stop.0), self.limit);
        let reading = tokio::task::spawn_blocking(move || {
            let hash = read(file, limit, &flag);
            drop(reader);
            hash
        });
        reading.await.map_err(io::Error::other)?
    }

    /// The hash, if it was computed before.
    pub(super) fn known(&self, fingerprint: Fingerprint) -> Option<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&fingerprint)?.get().cloned()
    }

    fn slot(&self, fingerprint: Fingerprint) -> Slot {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED && !known.contains_key(&fingerprint) {
            // Rare, and cheap to compute again.
            known.clear();
        }
        Arc::clone(known.entry(fingerprint).or_default())
    }
}

/// The fingerprint of an open file. May wait for its file system.
pub(super) fn fingerprint(file: &File) -> io::Result<Fingerprint> {
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

/// Tells the reading thread to stop when nobody waits for it any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn read(mut file: impl Read, limit: Limit, stop: &AtomicBool) -> Result<String, HashError> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut chunk = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        if stop.load(Ordering::Relaxed) {
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

    async fn hash(hasher: &Hasher, file: File) -> Result<String, HashError> {
        let fingerprint = fingerprint(&file)?;
        hasher.hash(file, fingerprint).await
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
        let stop = AtomicBool::new(false);
        let error = read(io::repeat(1), Limit(Some(1 << 20)), &stop).unwrap_err();
        assert!(matches!(error, HashError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_reader_without_audience_stops() {
        let stop = AtomicBool::new(true);
        let error = read(io::repeat(1), Limit(None), &stop).unwrap_err();
        assert!(matches!(error, HashError::TooSlow), "{error}");
    }

    #[tokio::test]
    async fn one_content_is_read_once() {
        let (named, _opened) = file(b"program");
        let hasher = Arc::new(Hasher::new(Limit::default()));
        let opened = || File::open(named.path()).unwrap();
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (hasher, file) = (Arc::clone(&hasher), opened());
            all.spawn(async move { hash(&hasher, file).await.unwrap() });
        }
        for hash in all.join_all().await {
            assert_eq!(hash, sha256_hex(b"program"));
        }
        assert_eq!(hasher.known.lock().unwrap().len(), 1);
        // What is remembered is used: a planted value comes back.
        let key = fingerprint(&opened()).unwrap();
        assert_eq!(Fingerprint::cached(named.path()), Some(key));
        assert_eq!(hasher.known(key), Some(sha256_hex(b"program")));
        let planted = Arc::new(OnceCell::new_with(Some("planted".to_owned())));
        hasher.known.lock().unwrap().insert(key, planted);
        assert_eq!(hash(&hasher, opened()).await.unwrap(), "planted");
    }

    /// A file system that hangs: reading it ends with the writer.
    fn hanging(inode: u64) -> (File, std::io::PipeWriter, Fingerprint) {
        let (reader, writer) = std::io::pipe().unwrap();
        let fingerprint = Fingerprint {
            device: 0,
            inode,
            size: 1,
            modified: (0, 0),
            changed: (0, 0),
        };
        (
            File::from(std::os::fd::OwnedFd::from(reader)),
            writer,
            fingerprint,
        )
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
            callers.spawn(async move { hasher.hash(file, fingerprint).await });
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
    async fn files_that_hang_take_a_few_threads_only() {
        let hasher = Arc::new(Hasher::new(Limit::default()));
        let (mut callers, mut writers) = (tokio::task::JoinSet::new(), Vec::new());
        for number in 0..READERS + 8 {
            let (file, writer, fingerprint) = hanging(number as u64);
            writers.push(writer);
            let hasher = Arc::clone(&hasher);
            callers.spawn(async move { hasher.hash(file, fingerprint).await });
        }
        while hasher.readers.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        tokio::time::advance(PATIENCE * 2).await;
        while let Some(ended) = callers.join_next().await {
            assert!(matches!(ended.unwrap(), Err(HashError::TooSlow)));
        }
        assert_eq!(hasher.readers.available_permits(), 0, "they hang still");
        drop(writers);
        let (_kept, opened) = file(b"program");
        assert!(hash(&hasher, opened).await.is_ok(), "threads came back");
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
