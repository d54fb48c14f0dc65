//! Programs that read an output again and again while it is renewed again and again.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use tbot::crypto::PrivateKey;
use tbot::crypto::pem;
use tbot::crypto::ssh;
use tbot::crypto::x509::Certificate;

use crate::common::{Cluster, KubeApi, PLAIN_BOT, Sandbox, eventually, wait_until};

/// How long renewals are forced. `TBOT_READER_SECONDS` (600 by hand) overrules it.
fn duration() -> Duration {
    std::env::var_os("TBOT_READER_SECONDS")
        .and_then(|seconds| seconds.to_str()?.parse().ok())
        .map_or(Duration::from_secs(5), Duration::from_secs)
}

/// What belongs together.
struct Parts {
    key: String,
    tls: String,
    ssh: String,
}

impl Parts {
    /// The separate files.
    fn of_files(read: impl Fn(&str) -> String) -> Self {
        Self {
            key: read("key"),
            tls: read("tlscert"),
            ssh: read("key-cert.pub"),
        }
    }

    /// The one file that has them all.
    fn of_identity(text: &str) -> Self {
        let blocks = pem::decode_all(text).unwrap();
        assert!(blocks.len() >= 3, "an identity without authorities");
        assert!(text.contains("@cert-authority ") && text.ends_with('\n'));
        let ssh = text
            .lines()
            .find(|line| line.contains("-cert-v01@openssh.com "));
        Self {
            key: pem::encode(&blocks[0].label, &blocks[0].der),
            tls: pem::encode(&blocks[1].label, &blocks[1].der),
            ssh: ssh.unwrap().to_owned(),
        }
    }

    /// Whether they match. Panics at a part that is torn.
    fn match_up(&self) -> bool {
        let key = PrivateKey::from_pem(&self.key).unwrap();
        let tls = Certificate::from_pem(&self.tls).unwrap();
        let ssh = ssh::SshCertificate::parse(self.ssh.trim()).unwrap();
        tls.is_for(&key) && ssh.is_for(&key)
    }
}

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

#[derive(Debug, Default)]
struct Count {
    reads: u64,
    /// How often separate files, read without the lock, were of two sets.
    mixed: u64,
    /// The longest time until they were of one again.
    longest: Duration,
}

/// Reads until it is done.
fn reader(done: &AtomicBool, mut look: impl FnMut() -> bool) -> Count {
    let mut count = Count::default();
    while !done.load(Ordering::Relaxed) {
        count.reads += 1;
        if !look() {
            count.mixed += 1;
            let began = Instant::now();
            eventually("the files are of one set", || {
                if look() { Ok(()) } else { Err("still mixed") }
            });
            count.longest = count.longest.max(began.elapsed());
        }
    }
    count
}

#[test]
fn a_reader_sees_whole_matching_sets_during_forced_renewals() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    let out = sandbox.path("out");
    let config = cluster.config(&token, "bot")
        + &format!(
            "outputs:\n  - {{type: identity, ssh_config: off, destination: {{type: directory, path: \
             {}}}}}\n  - {{type: identity, ssh_config: off, destination: {{type: kubernetes_secret, \
             name: identity}}}}\n",
            out.display()
        );
    let file = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(file);
    command.env("KUBECONFIG", api.kubeconfig(&sandbox, None));
    let mut agent = sandbox.spawn("agent", command);
    eventually("both outputs are written", || {
        let there = out.join("identity").exists() && api.data("identity").is_some();
        if there { Ok(()) } else { Err("not yet") }
    });
    let done = AtomicBool::new(false);
    let mut renewals = 0;
    std::thread::scope(|scope| {
        let identity = scope.spawn(|| {
            reader(&done, || {
                Parts::of_identity(&read(&out, "identity")).match_up()
            })
        });
        let locked = scope.spawn(|| {
            reader(&done, || {
                let lock = File::open(&out).unwrap();
                flock(&lock, FlockOperation::LockShared).unwrap();
                let parts = Parts::of_files(|name| read(&out, name));
                drop(lock);
                // A reader that never pauses would keep the writer out.
                std::thread::sleep(Duration::from_millis(1));
                parts.match_up()
            })
        });
        let plain = scope.spawn(|| {
            reader(&done, || {
                Parts::of_files(|name| read(&out, name)).match_up()
            })
        });
        let secret = scope.spawn(|| {
            reader(&done, || {
                let data = api.data("identity").unwrap();
                let whole = Parts::of_identity(&data["identity"]);
                let parts = Parts::of_files(|name| data[name].clone());
                whole.key == parts.key && whole.match_up() && parts.match_up()
            })
        });
        let end = Instant::now() + duration();
        let mut last = read(&out, "identity");
        while Instant::now() < end {
            agent.signal("HUP");
            last = eventually("the output is renewed", || {
                agent.check_running();
                let now = read(&out, "identity");
                if now == last { Err("not yet") } else { Ok(now) }
            });
            renewals += 1;
            wait_until(Instant::now() + Duration::from_millis(20));
        }
        done.store(true, Ordering::Relaxed);
        for (name, thread, atomic) in [
            ("identity", identity, true),
            ("files under the lock", locked, true),
            ("files without it", plain, false),
            ("Secret", secret, true),
        ] {
            let count = thread.join().unwrap();
            eprintln!("{name}: {count:?} in {renewals} renewals");
            assert!(count.reads > 10, "{name}");
            if atomic {
                assert_eq!(count.mixed, 0, "{name}");
            } else {
                assert!(count.mixed <= renewals, "{name}: {count:?}");
            }
        }
    });
    assert!(renewals > 2, "{renewals}");
}
