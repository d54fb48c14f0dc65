#!/bin/bash
# A job of GitLab CI on this machine: openssl signs the ID token that GitLab would, and the cluster is
# given GitLab's keys because it cannot ask for them.
. "$(dirname "$0")/../lib.sh"

encoded() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }

say "what GitLab has: a key, published as a key set"
openssl genrsa -out gitlab.key 2048 2> /dev/null
hex=$(openssl rsa -in gitlab.key -noout -modulus | cut -d= -f2)
modulus=$(printf "$(sed 's/../\\x&/g' <<< "$hex")" | encoded)
keys="{\"keys\":[{\"kty\":\"RSA\",\"use\":\"sig\",\"kid\":\"1\",\"n\":\"$modulus\",\"e\":\"AQAB\"}]}"

# The ID token of a job of example/app on a branch.
id_token() {
    local now header claims
    now=$(date +%s)
    header=$(printf '{"alg":"RS256","typ":"JWT","kid":"1"}' | encoded)
    claims=$(printf '{"iss":"https://gitlab.com","aud":"example.org","sub":"project_path:example/app:ref_type:branch:ref:%s","project_path":"example/app","ref":"%s","iat":%s,"nbf":%s,"exp":%s}' \
        "$1" "$1" "$now" "$now" $((now + 300)) | encoded)
    printf '%s.%s.%s' "$header" "$claims" \
        "$(printf '%s.%s' "$header" "$claims" | openssl dgst -sha256 -sign gitlab.key -binary | encoded)"
}

say "a bot, and who may join as it"
cat > token.yaml <<YAML
kind: bot
version: v1
metadata: {name: ci}
spec: {roles: []}
---
kind: token
version: v2
metadata: {name: ci-gitlab}
spec:
  roles: [Bot]
  bot_name: ci
  join_method: gitlab
  gitlab:
    static_jwks: '$keys'
    allow:
    - project_path: example/app
      ref: main
YAML
start_cluster
cluster create -f token.yaml

job() {
    TBOT_GITLAB_JWT=$(id_token "$1") "$tbot" start identity --oneshot \
        --proxy-server "localhost:$port" --join-method gitlab --token ci-gitlab \
        --storage memory:// --destination ./identity
}

say "a job on main"
began=$(date +%s%N)
job main 2> main.log
echo "from start to files: $((($(date +%s%N) - began) / 1000000)) ms, the token's signature included"
openssl x509 -in identity/tlscert -noout -subject -nameopt RFC2253 | grep -o "CN=[^,]*"
ls identity
rm -r identity

say "a job on another branch"
if job feature 2> feature.log; then
    echo "it got one" >&2
    exit 1
fi
tail -n 1 feature.log
sed -n 's/.*"nearest_rule":"\(.*\)","success".*/the audit log: \1/p' cluster/audit.jsonl
