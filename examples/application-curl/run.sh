#!/bin/bash
# curl reaches an application with the certificate of an `application` output; the application's own
# certificate is an SVID, and nginx is told whenever there is a new one.
. "$(dirname "$0")/../lib.sh"
app_port=${APP_PORT:-8443}
sed -i "s|/opt/example|$work|; s|127.0.0.1:8443|127.0.0.1:$app_port|" server.yaml nginx.conf

say "an application, who may use it, and who may serve it"
start_cluster
cluster create -f resources.yaml
cluster get app

say "the client's files"
once client
ls client

say "the server: nginx with an SVID"
background server-agent "$tbot" start -c server.yaml --proxy-server "localhost:$port" --join-method token \
    --token "$(invite server)"
until_ok test -s server/svid_bundle.pem
background nginx nginx -c "$work/nginx.conf"
request() {
    curl -sS --fail --cacert server/svid_bundle.pem "$@" "https://localhost:$app_port/"
}
until_ok request --cert client/tls.crt --key client/tls.key
request --cert client/tls.crt --key client/tls.key

say "without the certificate there is nothing to see"
if request 2> refused.log; then exit 1; fi
cat refused.log

say "a new SVID reaches nginx by itself"
serial() {
    openssl s_client -connect "localhost:$app_port" < /dev/null 2> /dev/null | openssl x509 -noout -serial
}
before=$(serial)
kill -HUP "${children[1]}"
changed() { [ "$(serial)" != "$before" ]; }
until_ok changed
echo "was $before, is $(serial)"
