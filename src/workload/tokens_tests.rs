use std::collections::VecDeque;

use async_trait::async_trait;
use futures_util::future::join_all;

use super::*;
use crate::attest::Process;
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsUnix};
use crate::workload::Crl;
use crate::workload::tests::{HOUR, TokenKey, start};

const MINUTE: Duration = Duration::from_mins(1);

/// Issues for an hour at a time, unless told otherwise.
#[derive(Debug)]
struct Fake {
    clock: Clock,
    script: Mutex<VecDeque<Result<(), IssueError>>>,
    always: Mutex<Option<IssueError>>,
    calls: Mutex<Vec<Vec<String>>>,
    delay: Mutex<Duration>,
    /// Where it was asked last.
    runtime: Mutex<Option<tokio::runtime::Id>>,
    key: TokenKey,
}

#[async_trait]
impl TokenIssuer for Fake {
    async fn issue(
        &self,
        _selector: &Selector,
        _ttl: Duration,
        _attributes: &WorkloadAttrs,
        audiences: &[String],
    ) -> Result<Vec<JwtSvid>, IssueError> {
        let number = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(audiences.to_vec());
            calls.len()
        };
        *self.runtime.lock().unwrap() = Some(Handle::current().id());
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        let scripted = self.script.lock().unwrap().pop_front();
        match scripted {
            Some(Err(error)) => return Err(error),
            Some(Ok(())) => return Ok(Vec::new()),
            None => {}
        }
        if let Some(error) = self.always.lock().unwrap().clone() {
            return Err(error);
        }
        let audiences: Vec<&str> = audiences.iter().map(String::as_str).collect();
        let mut svid = self.key.token("/a", &audiences, self.clock.now() + HOUR);
        svid.hint = number.to_string();
        Ok(vec![svid])
    }
}

struct World {
    fake: Arc<Fake>,
    tokens: Tokens,
    clock: Clock,
    shelf: Shelf,
}

fn world() -> World {
    let clock = Clock::simulated(start());
    let key = TokenKey::new();
    let shelf = Shelf::default();
    shelf.tell(&key.bundles(), &Crl::None);
    let fake = Arc::new(Fake {
        clock: clock.clone(),
        script: Mutex::default(),
        always: Mutex::default(),
        calls: Mutex::default(),
        delay: Mutex::new(Duration::from_millis(50)),
        runtime: Mutex::default(),
        key,
    });
    World {
        tokens: tokens(&fake, &shelf),
        fake,
        clock,
        shelf,
    }
}

fn tokens(fake: &Arc<Fake>, shelf: &Shelf) -> Tokens {
    let issuer: Arc<dyn TokenIssuer> = Arc::clone(fake) as _;
    let clock = fake.clock.clone();
    Tokens::new(
        issuer,
        Selector::Name("a".into()),
        HOUR,
        clock,
        shelf.clone(),
    )
}

fn workload(pid: i32) -> Arc<Attested> {
    workload_of(0, pid, None)
}

fn workload_of(uid: u32, pid: i32, process: Option<Process>) -> Arc<Attested> {
    let attributes = WorkloadAttrs {
        unix: Some(WorkloadAttrsUnix {
            pid,
            uid,
            ..WorkloadAttrsUnix::default()
        }),
        ..WorkloadAttrs::default()
    };
    Arc::new(Attested::new(attributes, process))
}

impl World {
    async fn get(&self, pid: i32, audiences: &[&str]) -> Result<String, IssueError> {
        self.get_for(&workload(pid), audiences).await
    }

    async fn get_for(
        &self,
        attested: &Arc<Attested>,
        audiences: &[&str],
    ) -> Result<String, IssueError> {
        let audiences = audiences.iter().map(|&text| text.to_owned()).collect();
        let issued = self.tokens.get(attested, audiences).await?;
        Ok(issued.svids[0].hint.clone())
    }

    /// The same for a process that is known again after a restart.
    async fn get_known(&self, audiences: &[&str]) -> Result<String, IssueError> {
        let pid = i32::try_from(std::process::id()).unwrap();
        let attested = workload_of(0, pid, Process::of(pid));
        self.get_for(&attested, audiences).await
    }

    /// As if the agent were another one that has this one's shelf.
    fn restart(&mut self) {
        self.tokens = tokens(&self.fake, &self.shelf);
    }

    /// Sets the agent's clock back; the cluster's goes on. Nobody may be asking.
    fn set_back(&mut self, by: Duration) {
        self.clock = Clock::simulated(self.clock.now() - by);
        let inner = Arc::get_mut(&mut self.tokens.0).unwrap();
        inner.clock = self.clock.clone();
    }

    fn calls(&self) -> usize {
        self.fake.calls.lock().unwrap().len()
    }

    fn fail_with(&self, error: Option<IssueError>) {
        *self.fake.always.lock().unwrap() = error;
    }
}

fn outage() -> IssueError {
    IssueError::Unavailable("down".into())
}

fn refusal() -> IssueError {
    IssueError::Refused("no rule".into())
}

#[tokio::test(start_paused = true)]
async fn the_same_set_of_audiences_is_one_token_and_another_is_another() {
    let world = world();
    assert_eq!(world.get(1, &["a", "b"]).await.unwrap(), "1");
    for same in [&["a", "b"][..], &["b", "a"], &["a", "b", "a"]] {
        assert_eq!(world.get(1, same).await.unwrap(), "1");
    }
    for (number, (pid, other)) in [
        (1, &["a"][..]),
        (1, &["b"]),
        (1, &["a", "b", "c"]),
        (1, &["a,b"]),
        (1, &["ab"]),
        (2, &["a", "b"]),
    ]
    .into_iter()
    .enumerate()
    {
        let token = world.get(pid, other).await.unwrap();
        assert_eq!(token, (number + 2).to_string(), "{pid} {other:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn callers_at_once_cause_one_request_even_if_the_first_gives_up() {
    let world = world();
    let first = world.get(1, &["a"]);
    assert!(
        tokio::time::timeout(Duration::from_millis(1), first)
            .await
            .is_err()
    );
    let all = join_all((0..100).map(|_| world.get(1, &["a"]))).await;
    assert!(all.iter().all(|one| one.as_deref() == Ok("1")), "{all:?}");
    assert_eq!(world.calls(), 1);
}

#[tokio::test]
async fn a_request_outlives_the_runtime_of_its_caller() {
    let world = Arc::new(world());
    let caller = Arc::clone(&world);
    let told = tokio::task::spawn_blocking(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(caller.get(1, &["a"]))
    });
    assert_eq!(told.await.unwrap().unwrap(), "1");
    let own = Some(Handle::current().id());
    assert_eq!(*world.fake.runtime.lock().unwrap(), own);
    assert_eq!(world.get(1, &["b"]).await.unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn a_token_is_handed_out_until_half_of_its_life() {
    let world = world();
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    for _ in 0..29 {
        world.clock.sleep(MINUTE).await;
        assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    }
    world.clock.sleep(MINUTE).await;
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_bridged_almost_to_the_end() {
    let world = world();
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    world.fail_with(Some(outage()));
    for minute in 1..60 {
        world.clock.sleep(Duration::from_secs(59)).await;
        if minute < 59 {
            assert_eq!(world.get(1, &["a"]).await.unwrap(), "1", "{minute}");
        }
        world.clock.sleep(Duration::from_secs(1)).await;
    }
    assert!(world.calls() < 40, "{} calls", world.calls());
    assert_eq!(world.get(1, &["a"]).await, Err(outage()), "too little left");
    world.fail_with(None);
    world.clock.sleep(FAILURE_KEPT).await;
    assert!(world.get(1, &["a"]).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_silent_cluster_does_not_hold_up_who_has_a_token() {
    let world = world();
    world.get(1, &["a"]).await.unwrap();
    world.clock.sleep(31 * MINUTE).await;
    *world.fake.delay.lock().unwrap() = 10 * MINUTE;
    let before = world.clock.now();
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    let waited = world.clock.now().duration_since(before).unwrap();
    assert!(
        waited <= WITH_FALLBACK + Duration::from_millis(1),
        "{waited:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_refusal_withdraws_what_is_held_and_an_outage_does_not() {
    let world = world();
    world.get(1, &["a"]).await.unwrap();
    world.clock.sleep(31 * MINUTE).await;
    let script = [Err(outage()), Err(refusal())];
    world.fake.script.lock().unwrap().extend(script);
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    world.clock.sleep(2 * MINUTE).await;
    assert_eq!(world.get(1, &["a"]).await, Err(refusal()));
    assert_eq!(
        world.get(1, &["a"]).await,
        Err(refusal()),
        "asked a moment ago"
    );
    assert_eq!(world.calls(), 3);
    world.clock.sleep(FAILURE_KEPT).await;
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "4");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_for_some_audiences_is_one_for_all() {
    let mut world = world();
    for audience in ["a", "b"] {
        world.get_known(&[audience]).await.unwrap();
        world.get(1, &[audience]).await.unwrap();
    }
    let bytes = world.tokens.0.table().bytes();
    world.fail_with(Some(refusal()));
    assert_eq!(world.get_known(&["c"]).await, Err(refusal()));
    world.fail_with(Some(outage()));
    assert!(world.tokens.0.table().bytes() < bytes, "less is held");
    for audience in ["a", "b"] {
        assert_eq!(world.get_known(&[audience]).await, Err(outage()));
        assert!(world.get(1, &[audience]).await.is_ok(), "somebody else");
    }
    world.restart();
    assert_eq!(world.get_known(&["a"]).await, Err(outage()), "the shelf");
}

#[tokio::test(start_paused = true)]
async fn an_empty_answer_is_a_refusal() {
    let world = world();
    world.fake.script.lock().unwrap().push_back(Ok(()));
    assert!(matches!(
        world.get(1, &["a"]).await,
        Err(IssueError::Refused(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn a_change_of_keys_is_asked_about_at_once_and_bridged_too() {
    let world = world();
    world.get(1, &["a"]).await.unwrap();
    world.tokens.renew_all();
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "2");
    world.tokens.renew_all();
    world.fail_with(Some(outage()));
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_is_bounded_and_ends_after_its_last_use() {
    let world = world();
    for number in 0..table::PER_WORKLOAD + 10 {
        world.get(1, &[&number.to_string()]).await.unwrap();
    }
    assert_eq!(world.tokens.len(), (table::PER_WORKLOAD, 1));
    let newest = (table::PER_WORKLOAD + 9).to_string();
    let calls = world.calls();
    world.get(1, &[&newest]).await.unwrap();
    assert_eq!(world.calls(), calls, "the newest stayed");
    tokio::select! {
        () = world.tokens.run() => {}
        () = world.clock.sleep(IDLE + 2 * MINUTE) => {}
    }
    assert_eq!(world.tokens.len(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_restart_forgets_neither_tokens_nor_how_old_they_are() {
    let mut world = world();
    assert_eq!(world.get_known(&["a", "b"]).await.unwrap(), "1");
    assert_eq!(world.get(1, &["a", "b"]).await.unwrap(), "2");
    world.fail_with(Some(outage()));
    world.restart();
    assert_eq!(world.get_known(&["b", "a"]).await.unwrap(), "1");
    assert_eq!(world.calls(), 2, "a young one needs no cluster");
    assert_eq!(world.get_known(&["a"]).await, Err(outage()), "others");
    assert_eq!(world.get(1, &["a", "b"]).await, Err(outage()), "unknown");

    world.clock.sleep(31 * MINUTE).await;
    world.restart();
    let calls = world.calls();
    assert_eq!(
        world.get_known(&["a", "b"]).await.unwrap(),
        "1",
        "an outage"
    );
    assert_eq!(world.calls(), calls + 1, "an old one is asked about");
    world.clock.sleep(28 * MINUTE).await;
    world.restart();
    assert_eq!(world.get_known(&["a", "b"]).await, Err(outage()), "too old");
}

#[tokio::test(start_paused = true)]
async fn what_was_renewed_or_refused_does_not_come_back_from_the_shelf() {
    let mut world = world();
    world.get_known(&["a"]).await.unwrap();
    world.tokens.renew_all();
    tokio::select! {
        () = world.tokens.run() => {}
        () = world.clock.sleep(IDLE + 2 * MINUTE) => {}
    }
    assert_eq!(world.tokens.len(), (0, 0));
    assert_eq!(world.get_known(&["a"]).await.unwrap(), "2", "asked anew");

    world.tokens.renew_all();
    world.fail_with(Some(refusal()));
    assert_eq!(world.get_known(&["a"]).await, Err(refusal()));
    world.fail_with(Some(outage()));
    world.restart();
    assert_eq!(world.get_known(&["a"]).await, Err(outage()));
}

#[tokio::test(start_paused = true)]
async fn what_was_under_way_when_all_were_to_renew_is_asked_for_again() {
    let world = world();
    let (before, since) = tokio::join!(world.get(1, &["a"]), async {
        world.clock.sleep(Duration::from_millis(10)).await;
        world.tokens.renew_all();
        world.get(1, &["a"]).await
    });
    assert_eq!(before.unwrap(), "1", "it did not come after the change");
    assert_eq!(since.unwrap(), "2");
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "2");
    assert_eq!(world.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_asked_for_after_all_were_to_renew_is_new_whatever_the_clock_says() {
    let mut world = world();
    world.get(1, &["a"]).await.unwrap();
    world.tokens.renew_all();
    world.set_back(10 * MINUTE);
    for audience in ["a", "b"] {
        world.get(1, &[audience]).await.unwrap();
        let calls = world.calls();
        world.get(1, &[audience]).await.unwrap();
        assert_eq!(world.calls(), calls, "{audience}");
    }
    assert_eq!(world.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_prolongs_no_failure() {
    let mut world = world();
    world.get(1, &["a"]).await.unwrap();
    world.clock.sleep(31 * MINUTE).await;
    world.fail_with(Some(outage()));
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "1");
    assert_eq!(world.get(1, &["b"]).await, Err(outage()));
    world.fail_with(None);
    world.set_back(Duration::from_secs(30));
    world.clock.sleep(Duration::from_secs(2)).await;
    assert_eq!(world.get(1, &["a"]).await.unwrap(), "4");
    assert_eq!(world.get(1, &["b"]).await.unwrap(), "5");
}

#[tokio::test(start_paused = true)]
async fn a_user_who_asks_for_many_takes_its_own_memory_only() {
    let world = world();
    *world.fake.delay.lock().unwrap() = Duration::from_micros(1);
    let small = workload_of(9, 1, None);
    world.get_for(&small, &["a"]).await.unwrap();
    let long = "x".repeat(8000);
    let table = || world.tokens.0.table();
    for uid in 1..7 {
        for pid in 0..4 {
            let attested = workload_of(uid, pid, None);
            for number in 0..50 {
                let before = world.calls();
                let audience = format!("{number}{long}");
                world.get_for(&attested, &[&audience]).await.unwrap();
                world.get_for(&attested, &[&audience]).await.unwrap();
                assert_eq!(world.calls(), before + 1, "the newest stays");
            }
        }
        let bytes = table().bytes();
        let most = table::OF_USER * usize::try_from(uid).unwrap();
        assert!(bytes > most.min(table::OF_ALL) * 3 / 4, "{bytes}");
        assert!(bytes <= most.min(table::OF_ALL) + 10_000, "{bytes}");
        // Whoever has little keeps it.
        let before = world.calls();
        world.get_for(&small, &["a"]).await.unwrap();
        assert_eq!(world.calls(), before);
    }
    table().sweep(world.clock.now(), &HashSet::new());
    assert_eq!(table().bytes(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_for_a_process_that_ended_goes() {
    let world = world();
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let attested = workload_of(0, pid, Process::of(pid));
    world.get_for(&attested, &["a"]).await.unwrap();
    world.get_known(&["a"]).await.unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    tokio::select! {
        () = world.tokens.run() => {}
        () = world.clock.sleep(2 * MINUTE) => {}
    }
    assert_eq!(world.tokens.len(), (1, 1));
    let calls = world.calls();
    world.get_known(&["a"]).await.unwrap();
    assert_eq!(world.calls(), calls, "who runs keeps its own");
}

#[tokio::test(start_paused = true)]
async fn a_users_flood_keeps_only_itself_waiting() {
    let world = world();
    *world.fake.delay.lock().unwrap() = Duration::from_secs(1);
    let attested = workload_of(1, 1, None);
    let names: Vec<String> = (0..WAITING + 100).map(|n| n.to_string()).collect();
    let flood = names.iter().map(|name| async {
        let asked = world.clock.now();
        let told = world.get_for(&attested, &[name]).await;
        let waited = world.clock.now().duration_since(asked).unwrap();
        (told, waited)
    });
    let other = async {
        world.clock.sleep(Duration::from_millis(1500)).await;
        let asked = world.clock.now();
        world
            .get_for(&workload_of(2, 2, None), &["a"])
            .await
            .unwrap();
        let waited = world.clock.now().duration_since(asked).unwrap();
        assert!(waited < Duration::from_secs(2), "{waited:?}");
    };
    let (flood, ()) = tokio::join!(join_all(flood), other);
    let turned_away = flood.iter().filter(|(told, waited)| {
        matches!(told, Err(IssueError::Unavailable(why)) if why.contains("512"))
            && *waited < Duration::from_secs(1)
    });
    assert_eq!(turned_away.count(), 100);
    assert_eq!(
        flood.iter().filter(|(told, _)| told.is_ok()).count(),
        WAITING
    );
}

#[tokio::test(start_paused = true)]
async fn what_nobody_waits_for_any_more_is_not_asked_for() {
    let world = world();
    *world.fake.delay.lock().unwrap() = Duration::from_secs(1);
    let names: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    let all = join_all(names.iter().map(|name| async {
        let audiences = [name.as_str()];
        let asked = world.get(1, &audiences);
        let told = tokio::time::timeout(Duration::from_millis(1), asked).await;
        assert!(told.is_err());
    }));
    all.await;
    let under_way = world.calls();
    assert!(under_way < 20, "{under_way}");
    assert!(world.get(1, &["99"]).await.is_ok());
    assert_eq!(world.calls(), under_way + 1);
}
