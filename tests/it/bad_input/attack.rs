//! Someone swaps the destination, its parent, a directory in it and a file in it for links to another
//! place, as fast as possible, while sets are written.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use tbot::config::{self, Overlay, Source};
use tbot::destination::{Destination, FileSet};
use tbot::env::Env;

use super::snapshot;
use crate::common::Sandbox;

/// How long each attack goes on. `TBOT_ATTACK_SECONDS` (a minute by hand) overrules it.
fn duration() -> Duration {
    std::env::var_os("TBOT_ATTACK_SECONDS")
        .and_then(|seconds| seconds.to_str()?.parse().ok())
        .map_or(Duration::from_secs(2), Duration::from_secs)
}

fn destination(path: &Path, symlinks: &str) -> Arc<dyn Destination> {
    let source = Source {
        name: "tbot.yaml".to_owned(),
        text: format!(
            "version: v2\nservices: [{{type: identity, ssh_config: off, destination: {{type: \
             directory, path: {}, symlinks: {symlinks}}}}}]",
            path.display()
        ),
    };
    let loaded = config::load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
    loaded.plan.services[0].plan.destination().unwrap().build()
}

/// What is attacked, and the place that nothing must get into.
struct Scene {
    victim: PathBuf,
    /// The destination's path.
    out: PathBuf,
    /// Pairs that change places all the time: the real thing and a link into the victim.
    swapped: [(PathBuf, PathBuf); 4],
}

impl Scene {
    fn new(sandbox: &Sandbox) -> Self {
        let base = sandbox.path("").canonicalize().unwrap();
        let victim = base.join("victim");
        let parent = base.join("parent");
        let out = parent.join("out");
        std::fs::create_dir_all(victim.join("out/cockroach")).unwrap();
        std::fs::create_dir_all(victim.join("cockroach")).unwrap();
        std::fs::create_dir_all(out.join("cockroach")).unwrap();
        for name in ["key", "tlscert", "out/key", "out/tlscert", "node.key"] {
            std::fs::write(victim.join(name), "untouched").unwrap();
        }
        std::fs::write(out.join("key"), "").unwrap();
        let trap = |name: &str, target: &Path| {
            let trap = base.join(name);
            symlink(target, &trap).unwrap();
            trap
        };
        let swapped = [
            (parent.clone(), trap("trap-parent", &victim)),
            (out.clone(), trap("trap-out", &victim)),
            (out.join("cockroach"), trap("trap-folder", &victim)),
            (out.join("key"), trap("trap-key", &victim.join("key"))),
        ];
        Self {
            victim,
            out,
            swapped,
        }
    }

    /// Attacks while sets are written. Says how many were, how many could not be, how often things
    /// were swapped, and whether anything got into the victim.
    fn run(&self, symlinks: &str, end_on_escape: bool) -> (u32, u32, u32, bool) {
        let before = snapshot(&self.victim);
        let escaped = || snapshot(&self.victim) != before;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let attacker = scope.spawn(|| {
                let mut swaps = 0;
                while !done.load(Ordering::Relaxed) {
                    for (real, trap) in &self.swapped {
                        for _ in 0..2 {
                            // Fails while something further up is swapped.
                            let swap = renameat_with(CWD, real, CWD, trap, RenameFlags::EXCHANGE);
                            swaps += u32::from(swap.is_ok());
                            std::thread::yield_now();
                        }
                    }
                }
                swaps
            });
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            let (mut written, mut refused) = (0, 0);
            let end = Instant::now() + duration();
            let mut generation = 0;
            while Instant::now() < end {
                let place = destination(&self.out, symlinks);
                for _ in 0..20 {
                    generation += 1;
                    let files: FileSet = ["key", "tlscert", "cockroach/node.key"]
                        .map(|name| {
                            let text = format!("{name} {generation}");
                            (name.to_owned(), text.into_bytes().into())
                        })
                        .into();
                    match runtime.block_on(place.write(files)) {
                        Ok(()) => written += 1,
                        Err(_) => refused += 1,
                    }
                }
                if end_on_escape && escaped() {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
            (written, refused, attacker.join().unwrap(), escaped())
        })
    }
}

#[test]
fn nothing_gets_out_of_a_destination_whose_path_changes_all_the_time() {
    for symlinks in ["secure", "try-secure"] {
        let sandbox = Sandbox::new();
        let scene = Scene::new(&sandbox);
        let (written, refused, swaps, escaped) = scene.run(symlinks, false);
        eprintln!("{symlinks}: {written} sets written, {refused} refused, {swaps} swaps");
        assert!(!escaped, "{symlinks}: {:?}", snapshot(&scene.victim).keys());
        assert!(written > 0 && refused > 0 && swaps > 100);
    }
}

#[test]
fn the_attack_is_one() {
    let sandbox = Sandbox::new();
    let (_, _, _, escaped) = Scene::new(&sandbox).run("insecure", true);
    assert!(escaped, "links were to be followed");
}
