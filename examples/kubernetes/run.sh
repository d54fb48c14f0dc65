#!/bin/bash
# A pod joins with its service account's token, which the cluster knows by the API server's keys.
. "$(dirname "$0")/../lib.sh"

base64url() { base64 -w0 | tr '+/' '-_' | tr -d '='; }

# The token of a service account (namespace:name) for an audience, as the API server makes it.
service_account() {
    local namespace=${1%:*} name=${1#*:} now
    now=$(date +%s)
    local header='{"alg":"RS256","kid":"k1"}'
    local claims="{\"iss\":\"https://kubernetes.default.svc\",\"aud\":[\"$2\"],
        \"sub\":\"system:serviceaccount:$namespace:$name\",\"iat\":$now,\"nbf\":$now,\"exp\":$((now + 600)),
        \"kubernetes.io\":{\"namespace\":\"$namespace\",\"pod\":{\"name\":\"$name-0\",\"uid\":\"1\"},
        \"serviceaccount\":{\"name\":\"$name\",\"uid\":\"2\"}}}"
    local signed
    signed=$(printf %s "$header" | base64url).$(printf %s "$claims" | base64url)
    printf '%s.%s' "$signed" "$(printf %s "$signed" | openssl dgst -sha256 -sign api-server.key -binary | base64url)"
}

# One run of the agent with the token of this service account, outside of Kubernetes.
agent() {
    service_account "$1" "$2" > sa-token
    KUBERNETES_TOKEN_PATH=$work/sa-token "$tbot" start identity --oneshot --proxy-server "localhost:$port" \
        --join-method kubernetes --token kubernetes-bot --storage "./$3" --destination ./out
}

refused() {
    if agent "$@" 2> refused.log; then echo "it was let in" >&2; exit 1; fi
    tail -n 1 refused.log
}

say "the API server's key, and the cluster that knows it"
openssl genrsa -out api-server.key 2048 2> /dev/null
n=$(openssl rsa -in api-server.key -noout -modulus | sed 's/Modulus=//' | xxd -r -p | base64url)
sed "s|JWKS|{\"keys\": [{\"kty\": \"RSA\", \"use\": \"sig\", \"alg\": \"RS256\", \"kid\": \"k1\", \"n\": \"$n\", \"e\": \"AQAB\"}]}|" \
    token.yaml.in > token.yaml
start_cluster
cluster create -f token.yaml

say "the pod of the service account tbot joins"
agent tbot:tbot example.org storage
openssl x509 -noout -subject -nameopt RFC2253 -in out/tlscert | grep -o "CN=[^,]*"

say "another service account does not"
refused default:default example.org other

say "nor does a token for another audience"
refused tbot:tbot https://kubernetes.default.svc another
