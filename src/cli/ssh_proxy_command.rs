//! `tbot ssh-proxy-command`: what a generated `ssh_config` starts to reach a host. This version
//! carries no SSH sessions and says what does; `ssh` shows it and ends.

use anyhow::anyhow;

use super::exit::Failure;

/// Refuses, with the command that works instead. `words` are the flags that `ssh_config` writes.
pub(super) fn run(words: &[String]) -> Failure {
    Failure::Runtime(anyhow!(
        "ssh-proxy-command: this version does not carry SSH sessions: use `{}`",
        instead(words)
    ))
}

/// The same with upstream's client, which the identity file is made for.
fn instead(words: &[String]) -> String {
    let value = |flag: &str, otherwise: &str| {
        let found = words.iter().enumerate().find_map(|(at, word)| {
            match word.strip_prefix(flag)?.strip_prefix('=') {
                Some(value) => Some(value.to_owned()),
                None if word == flag => words.get(at + 1).cloned(),
                None => None,
            }
        });
        found.unwrap_or_else(|| otherwise.to_owned())
    };
    format!(
        "tsh -i {}/identity --proxy={} ssh {}@{}",
        value("--destination-dir", "DIR"),
        value("--proxy-server", "PROXY"),
        value("--user", "USER"),
        value("--host", "HOST"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_works_has_the_same_parts() {
        let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        for (given, expected) in [
            (
                "--destination-dir=/opt/id --proxy-server=p:443 --cluster=c --tls-routing \
                 --no-connection-upgrade --resume --user=root --host=node.c --port=22",
                "tsh -i /opt/id/identity --proxy=p:443 ssh root@node.c",
            ),
            (
                "--user root --host node",
                "tsh -i DIR/identity --proxy=PROXY ssh root@node",
            ),
            (
                "--users=x --host",
                "tsh -i DIR/identity --proxy=PROXY ssh USER@HOST",
            ),
        ] {
            assert_eq!(instead(&words(given)), expected);
        }
    }
}
