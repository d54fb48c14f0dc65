#!/bin/bash
# The identity that teleport-event-handler reads while it forwards audit events to Fluentd.
. "$(dirname "$0")/../lib.sh"

say "the role of the event handler, and a bot that may take it on"
start_cluster --auth-listen "127.0.0.1:${AUTH_PORT:-3025}"
cluster create -f teleport-event-handler-role.yaml
cluster create bot.yaml
cluster bots update my-bot --add-roles teleport-event-handler

say "the agent writes /opt/machine-id (here: $work/machine-id)"
sed -i "s|/opt/machine-id|$work/machine-id|; s|/var/lib/teleport/bot|$work/storage|" \
    tbot.yaml teleport-event-handler.toml
once my-bot
ls machine-id

say "what the event handler does with it: TLS with the auth service, by the one file"
identity=$(sed -n 's/^identity = "\(.*\)"$/\1/p' teleport-event-handler.toml)
# Its parts are told apart by their order: the key, the certificate, then whom to believe.
csplit -s -z -f part- "$identity" '/^-----BEGIN/' '{*}'
cat part-00 > key.pem
sed -n '/^-----BEGIN/,/^-----END/p' part-01 > cert.pem
cat part-0[2-9] > authorities.pem
openssl s_client -connect "127.0.0.1:${AUTH_PORT:-3025}" -servername teleport.cluster.local -alpn h2 \
    -cert cert.pem -key key.pem -CAfile authorities.pem -verify_return_error < /dev/null 2> /dev/null \
    | grep -E "^(Verification|ALPN)"
