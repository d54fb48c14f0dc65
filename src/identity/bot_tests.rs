//! What is stored is used as far as it can be, what cannot be used is not stored, and a stop loses
//! nothing.

use super::*;
use crate::cluster::dial::Tcp;
use crate::crypto::KeyAlgorithm;
use crate::destination::{Destination, from_uri};
use crate::health::Registry;
use crate::identity::fixtures::{Authority, start};

fn key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
}

/// A bot at [`start`] and half an hour, on a storage in memory.
fn bot() -> (Bot, Arc<dyn Destination>) {
    let place = from_uri("memory://").unwrap().build();
    let clock = Clock::simulated(start() + Duration::from_mins(30));
    let settings = Settings {
        method: crate::join::method("token").unwrap().read(None),
        env: crate::env::Env::default(),
        token: None,
        route: Route::Direct("nowhere:3025".to_owned()),
        trust: Trust::default(),
        use_configured_address: false,
        ttl: Duration::from_hours(1),
        interval: Duration::from_mins(20),
    };
    let bot = Bot::new(
        settings,
        clock.clone(),
        Arc::new(Tcp),
        Store::open(Arc::clone(&place)),
        Registry::new(clock).reporter("identity"),
        watch::channel(0).1,
    );
    (bot, place)
}

fn generation(bot: &Bot) -> Option<u64> {
    bot.identity
        .borrow()
        .as_ref()
        .map(|identity| identity.generation())
}

#[tokio::test(start_paused = true)]
async fn a_stored_identity_that_tls_cannot_use_makes_room_for_the_one_before() {
    let (mut bot, place) = bot();
    let store = Store::open(place);
    let sound = Authority::new("root").identity(key(), 1, start());
    let odd = Authority::unusable("root").identity(key(), 2, start() + Duration::from_mins(20));
    store.commit(&sound, "").await.unwrap();
    store.commit(&odd, "").await.unwrap();
    bot.load().await.unwrap();
    assert_eq!(generation(&bot), Some(1));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_tls_cannot_use_is_not_stored() {
    let (mut bot, place) = bot();
    let sound = Authority::new("root").identity(key(), 1, start());
    let now = bot.clock.now();
    bot.accept(sound, "", Step::Join, now).await.unwrap();
    let odd = Authority::unusable("root").identity(key(), 2, start());
    let step = Step::Renew(Renewal::Certificate);
    let error = bot.accept(odd, "", step, now).await.unwrap_err();
    assert!(matches!(error, BotError::Credential(_)), "{error}");
    assert_eq!(error.disposition(), Disposition::Retry);
    assert_eq!(generation(&bot), Some(1));
    let stored = Store::open(place).load().await.unwrap().candidates;
    let generations: Vec<u64> = stored.iter().map(|s| s.identity.generation()).collect();
    assert_eq!(generations, [1]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_not_asked_for_is_refused_whole() {
    let hour = Duration::from_hours(1);
    let authority = Authority::new("root");
    let (mut bot, place) = bot();
    let now = bot.clock.now();
    let sound = authority.identity(key(), 1, start());
    bot.accept(sound, "", Step::Join, now).await.unwrap();
    let stored = async || {
        let mut files = Vec::new();
        for name in [".slot-0", ".slot-1", ".slot-2", "key", "tlscert"] {
            let bytes = place.read(name).await.unwrap();
            files.push(bytes.map(|bytes| bytes.expose().clone()));
        }
        files
    };
    let before = stored().await;
    let own = "bot-example";
    for (case, user, validity, said) in [
        (
            "another user",
            "bot-other",
            (start(), hour),
            "for bot-other where bot-example was",
        ),
        ("not valid yet", own, (now + hour, hour), "not valid now"),
        ("over", own, (start() - 2 * hour, hour), "not valid now"),
        ("never valid", own, (now, Duration::ZERO), "not valid now"),
        (
            "a hundred years",
            own,
            (start(), 876_000 * hour),
            "far beyond what was asked for",
        ),
    ] {
        let answer = authority.identity_of(user, key(), 2, validity);
        let step = Step::Renew(Renewal::Certificate);
        let error = bot.accept(answer, "", step, now).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(said), "{case}: {text}");
        assert!(
            text.starts_with("the cluster's certificates are not usable: "),
            "{case}: {text}"
        );
        assert_eq!(error.disposition(), Disposition::Retry, "{case}");
        assert_eq!(generation(&bot), Some(1), "{case}");
        assert_eq!(stored().await, before, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_cuts_what_costs_nothing_and_waits_a_little_for_what_does() {
    let clock = Clock::simulated(start());
    let second = Duration::from_secs(1);
    for (answered_after, stopped_after, grace, lasts, done) in [
        (Some(second), None, Duration::ZERO, second, true),
        (None, Some(second), Duration::ZERO, second, false),
        (None, Some(second), GRACE, second + GRACE, false),
        (Some(2 * second), Some(second), GRACE, 2 * second, true),
        (
            Some(2 * second),
            Some(second),
            Duration::ZERO,
            second,
            false,
        ),
    ] {
        let case = format!("{answered_after:?} {stopped_after:?} {grace:?}");
        let shutdown = CancellationToken::new();
        let work = async {
            match answered_after {
                Some(wait) => clock.sleep(wait).await,
                None => std::future::pending().await,
            }
            Ok(())
        };
        let stopping = async {
            if let Some(wait) = stopped_after {
                clock.sleep(wait).await;
                shutdown.cancel();
            }
        };
        let began = tokio::time::Instant::now();
        let (outcome, ()) = tokio::join!(unless_stopped(work, &clock, &shutdown, grace), stopping);
        assert_eq!(began.elapsed(), lasts, "{case}");
        assert_eq!(outcome.is_ok(), done, "{case}");
    }
}
