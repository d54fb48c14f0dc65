//! Logs and metrics: one line per event to standard error, one registry of numbers.
//!
//! The line format and the levels' names are those of Teleport's agent, so that what parses its
//! logs parses ours.

mod line;
pub mod metrics;

use std::io::{IsTerminal as _, Write};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, SubscriberExt as _};

use crate::clock::Clock;

/// An error and its causes as one line, from the outermost to the root; what was said already is
/// left out, because many errors repeat their source in their own text.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if line.contains(&cause) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `2026-11-21T08:15:02.908Z INFO [TBOT]      message key:value file.rs:1`
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// When text lines are coloured. JSON never is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Colour {
    /// If standard error is a terminal.
    #[default]
    Auto,
    /// Never.
    Never,
}

/// Logging was set up before in this process.
#[derive(Debug, thiserror::Error)]
#[error("logging is set up already")]
pub struct AlreadySet(#[from] tracing::subscriber::SetGlobalDefaultError);

/// Sends this process's log to standard error from now on.
///
/// Our own events are shown from `level` on; those of libraries from WARN on, from INFO on when
/// `level` is DEBUG, and all of them at TRACE: a library's debug output may hold what must not be
/// in a log.
///
/// # Errors
/// If it was called before.
pub fn init(format: Format, level: LevelFilter, colour: Colour) -> Result<(), AlreadySet> {
    let colour = match colour {
        Colour::Auto => format == Format::Text && std::io::stderr().is_terminal(),
        Colour::Never => false,
    };
    let layer = Lines {
        format,
        colour,
        clock: Clock::system(),
        out: Mutex::new(std::io::stderr()),
    };
    tracing::subscriber::set_global_default(subscriber(layer, level))?;
    Ok(())
}

fn subscriber<W: Write + Send + 'static>(
    layer: Lines<W>,
    level: LevelFilter,
) -> impl Subscriber + Send + Sync {
    // With the hint, what is below any level costs libraries one comparison, not a question.
    let filter = filter_fn(move |metadata| shown(metadata, level)).with_max_level_hint(level);
    tracing_subscriber::registry().with(layer.with_filter(filter))
}

/// Modules of libraries whose warnings repeat what other programs wrote, secrets perhaps included:
/// those that run a `credential_process`. The failure itself is told by the join.
const SILENT: [&str; 2] = [
    "aws_config::meta::credentials",
    "aws_config::profile::credentials",
];

/// Whether an event is to be logged when the user asked for `level`.
fn shown(metadata: &Metadata<'_>, level: LevelFilter) -> bool {
    let limit = match level {
        LevelFilter::TRACE => level,
        _ if SILENT.iter().any(|m| metadata.target().starts_with(m)) => LevelFilter::OFF,
        _ if line::ours(metadata.target()) => level,
        LevelFilter::DEBUG => LevelFilter::INFO,
        _ => level.min(LevelFilter::WARN),
    };
    *metadata.level() <= limit
}

/// Renders each event to one line and writes it in one call, so that lines of several threads do
/// not mix. Spans are not shown: every line stands alone.
struct Lines<W> {
    format: Format,
    colour: bool,
    clock: Clock,
    out: Mutex<W>,
}

impl<S: Subscriber, W: Write + Send + 'static> Layer<S> for Lines<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let line = match self.format {
            Format::Text => line::text(event, self.clock.now(), self.colour),
            Format::Json => line::json(event, self.clock.now()),
        };
        if let Ok(mut out) = self.out.lock() {
            // Nobody is left to tell if standard error is gone.
            drop(out.write_all(line.as_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::main(flavor = "current_thread")]
    async fn logged(format: Format, level: LevelFilter, colour: bool, say: fn()) -> String {
        tokio::time::pause();
        let buffer = Buffer::default();
        let layer = Lines {
            format,
            colour,
            // 2026-11-21T08:15:02.908Z
            clock: Clock::simulated(
                SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_248_902_908),
            ),
            out: Mutex::new(buffer.clone()),
        };
        tracing::subscriber::with_default(subscriber(layer, level), say);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    fn text(say: fn()) -> String {
        logged(Format::Text, LevelFilter::INFO, false, say)
    }

    /// The line without its caller, which moves with every edit of this file.
    fn without_caller(line: &str) -> &str {
        let (line, caller) = line.trim_end().rsplit_once(' ').unwrap();
        assert!(caller.starts_with("telemetry/mod.rs:"), "{caller}");
        line
    }

    #[test]
    fn a_line_reads_like_the_guides() {
        for (want, say) in [
            (
                "2026-11-21T08:15:02.908Z INFO [TBOT]      Inspecting endpoint path:unix:///opt/machine-id/workload.sock",
                (|| tracing::info!(target: "tbot::cli", path = "unix:///opt/machine-id/workload.sock", "Inspecting endpoint"))
                    as fn(),
            ),
            (
                "2026-11-21T08:15:02.908Z WARN [TBOT:IDEN] Renewal failed attempts:3 error:\"connection refused (os error 111)\"",
                || tracing::warn!(target: "tbot::identity::bot", attempts = 3, error = %"connection refused (os error 111)", "Renewal failed"),
            ),
            (
                "2026-11-21T08:15:02.908Z ERRO [AUDIT]     Cannot write empty:\"\" none:None",
                || tracing::error!(target: "tbot::embedded", component = "audit", empty = "", none = ?None::<u8>, "Cannot write"),
            ),
            (
                "2026-11-21T08:15:02.908Z WARN Connection reset",
                || tracing::warn!(target: "hyper::proto", "Connection reset"),
            ),
        ] {
            assert_eq!(without_caller(&text(say)), want);
        }
    }

    #[test]
    fn outside_text_cannot_forge_a_line() {
        let line = text(|| {
            tracing::info!(
                target: "tbot",
                name = "a\n2026-11-21T08:15:02.908Z INFO [TBOT] forged\u{1b}[2J\u{202e}",
                "told \u{1b}]0;title\u{7} \r\n by a peer"
            );
        });
        assert_eq!(line.lines().count(), 1);
        assert!(!line.trim_end().chars().any(char::is_control));
        assert_eq!(
            without_caller(&line),
            "2026-11-21T08:15:02.908Z INFO [TBOT]      told \\u{1b}]0;title\\u{7} \\r\\n by a peer \
             name:\"a\\n2026-11-21T08:15:02.908Z INFO [TBOT] forged\\u{1b}[2J\\u{202e}\""
        );
    }

    #[test]
    fn json_is_one_flat_object() {
        let line = logged(Format::Json, LevelFilter::INFO, true, || {
            tracing::warn!(target: "tbot::identity", service = "identity-output-1", tries = 2, ok = false, level = "x", "Renewal\nfailed");
        });
        assert_eq!(line.lines().count(), 1);
        let mut object: serde_json::Value = serde_json::from_str(&line).unwrap();
        let caller = object.as_object_mut().unwrap().remove("caller").unwrap();
        assert!(caller.as_str().unwrap().starts_with("telemetry/mod.rs:"));
        assert_eq!(
            object,
            serde_json::json!({
                "timestamp": "2026-11-21T08:15:02Z",
                "level": "warning",
                "component": "tbot:identity",
                "message": "Renewal\nfailed",
                "service": "identity-output-1",
                "tries": 2,
                "ok": false,
                "level_": "x",
            })
        );
    }

    #[test]
    fn colour_marks_the_level_only() {
        let line = logged(Format::Text, LevelFilter::INFO, true, || {
            tracing::error!(target: "tbot", "no");
        });
        assert!(
            line.contains("\u{1b}[31mERRO\u{1b}[0m [TBOT]      no"),
            "{line}"
        );
    }

    #[test]
    fn the_level_asked_for_rules_our_events_and_libraries_stay_quieter() {
        fn everything() {
            tracing::debug!(target: "tbot::app", "ours-debug");
            tracing::info!(target: "tbot::app", "ours-info");
            tracing::trace!(target: "h2::codec", "lib-trace");
            tracing::debug!(target: "h2::codec", "lib-debug");
            tracing::info!(target: "h2::codec", "lib-info");
            tracing::warn!(target: "tbotlike::x", "lib-warn");
        }
        for (level, want) in [
            (LevelFilter::ERROR, vec![]),
            (LevelFilter::INFO, vec!["ours-info", "lib-warn"]),
            (
                LevelFilter::DEBUG,
                vec!["ours-debug", "ours-info", "lib-info", "lib-warn"],
            ),
            (
                LevelFilter::TRACE,
                vec![
                    "ours-debug",
                    "ours-info",
                    "lib-trace",
                    "lib-debug",
                    "lib-info",
                    "lib-warn",
                ],
            ),
        ] {
            let told = logged(Format::Text, level, false, everything);
            let told: Vec<_> = told
                .split_whitespace()
                .filter(|word| word.starts_with("ours-") || word.starts_with("lib-"))
                .collect();
            assert_eq!(told, want, "{level}");
        }
    }
}
