#!/bin/bash
# ssh logs in to sshd: certificates on both sides, no known_hosts to keep, no authorized_keys.
. "$(dirname "$0")/../lib.sh"
ssh_port=${SSH_PORT:-2222}
login=$(id -un)
sed -i "s|/opt/example|$work|; s|\[root\]|[$login]|; s|127.0.0.1:2222|127.0.0.1:$ssh_port|" server.yaml resources.yaml

say "a server, who may log in to it, and who may be it"
start_cluster
cluster create -f resources.yaml

say "sshd, with a host certificate"
background server-agent "$tbot" start -c server.yaml --proxy-server "localhost:$port" --join-method token \
    --token "$(invite server)"
until_ok test -s server/ssh_host-user-ca.pub
cat > sshd_config <<EOF
ListenAddress 127.0.0.1:$ssh_port
PidFile $work/sshd.pid
HostKey $work/server/ssh_host
HostCertificate $work/server/ssh_host-cert.pub
TrustedUserCAKeys $work/server/ssh_host-user-ca.pub
AuthorizedKeysFile none
AuthenticationMethods publickey
StrictModes no
EOF
mkdir -p /run/sshd 2> /dev/null || true
background sshd "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f sshd_config
until_ok test -s sshd.pid

say "ssh, by the name that the cluster knows"
once client
log_in() { ssh -F client/ssh_config -o BatchMode=yes "$login@web-1.example.org" "$@"; }
until_ok log_in true
log_in 'echo "hello from $(id -un)"'

say "sshd tells who it was"
grep -o 'Accepted publickey for [^ ]*\|ID bot-client' sshd.log | tail -n 2
