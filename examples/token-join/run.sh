#!/bin/bash
# A machine joins with a token that an administrator makes for it, once and for five minutes.
. "$(dirname "$0")/../lib.sh"

say "a bot and a token for it"
start_cluster
cluster create -f bot.yaml
token=$(invite example)
cluster tokens ls

say "the machine joins"
"$tbot" start -c tbot.yaml --proxy-server "localhost:$port" --join-method token --token "$token" --oneshot
openssl verify -CAfile machine-id/teleport-user-ca.crt machine-id/tlscert
openssl x509 -noout -subject -nameopt RFC2253 -in machine-id/tlscert | grep -o "CN=[^,]*"

say "a second machine cannot use the same token"
if "$tbot" start -c tbot.yaml --proxy-server "localhost:$port" --join-method token --token "$token" \
    --data-dir ./other --oneshot 2> second.log; then
    echo "it could" >&2
    exit 1
fi
tail -n 1 second.log

say "a token is taken back before anybody uses it"
token=$(invite example)
cluster tokens rm "$token"
if "$tbot" start -c tbot.yaml --proxy-server "localhost:$port" --join-method token --token "$token" \
    --data-dir ./third --oneshot 2> third.log; then
    echo "it could be used" >&2
    exit 1
fi
tail -n 1 third.log
