# Sourced by every run.sh: a cluster and agents in a directory of their own, ended with the script.
#
# TBOT   the program              [default: tbot]
# PORT   the cluster's port       [default: 3080]
# KEEP   leave the directory      [default: it is removed]
set -euo pipefail
tbot=${TBOT:-tbot}
port=${PORT:-3080}
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
work=$(mktemp -d)
children=()

finish() {
    local code=$?
    trap - EXIT
    for child in "${children[@]}"; do kill "$child" 2> /dev/null || true; done
    wait
    if [ "$code" != 0 ]; then tail -n 20 "$work"/*.log >&2 || true; fi
    if [ -n "${KEEP:-}" ]; then echo "left in $work"; else rm -rf "$work"; fi
    exit "$code"
}
trap finish EXIT

# Says what comes, as a heading.
say() { printf '\n# %s\n' "$*"; }

# Runs a command until it succeeds; a minute at most.
until_ok() {
    local end=$((SECONDS + 60))
    until "$@" > /dev/null 2>&1; do
        if [ $SECONDS -ge $end ]; then echo "in vain: $*" >&2; "$@" >&2 || true; return 1; fi
        sleep 0.1
    done
}

# Starts a program that ends with the script; its output is in NAME.log.
background() {
    local name=$1
    shift
    "$@" > "$work/$name.log" 2>&1 &
    children+=($!)
}

# What an administrator does: `tctl` at a Teleport cluster.
cluster() { "$tbot" cluster --data-dir "$work/cluster" "$@"; }

# Starts the cluster, with more arguments of `tbot cluster serve`. Agents believe it from then on.
start_cluster() {
    background cluster "$tbot" cluster serve --data-dir "$work/cluster" --cluster-name example.org \
        --listen "127.0.0.1:$port" --public-addr "localhost:$port" "$@"
    until_ok cluster status
    export SSL_CERT_FILE=$work/cluster/web-ca.pem
}

# A token that lets a bot join once.
invite() { cluster tokens add --type=bot --bot "$1" --ttl 5m --format text; }

# Runs an agent once, as a bot that joins with a new token; by tbot.yaml, or by the file that is named.
once() {
    local bot=$1 config=${2:-tbot.yaml}
    "$tbot" start -c "$config" --proxy-server "localhost:$port" --join-method token \
        --token "$(invite "$bot")" --oneshot
}

cp -r "$here/." "$work/"
cd "$work"
