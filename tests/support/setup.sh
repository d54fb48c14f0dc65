#!/bin/bash
# Brings what the tests need besides Rust. Idempotent.
#
# usage: setup.sh VENV
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)

# command:Debian package
missing=()
for need in systemctl:systemd dbus-daemon:dbus unshare:util-linux nsenter:util-linux openssl:openssl \
    ssh-keygen:openssh-client sshd:openssh-server python3:python3 curl:curl setfacl:acl \
    kubectl:kubernetes-client swtpm:swtpm swtpm_setup:swtpm-tools tpm2_getcap:tpm2-tools strace:strace nginx:nginx-light psql:postgresql-client \
    dockerd:docker.io podman:podman catatonit:catatonit docker-registry:docker-registry; do
    command -v "${need%%:*}" > /dev/null || missing+=("${need##*:}")
done
# Debian keeps the server's programs out of PATH.
command -v initdb > /dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null ||
    missing+=(postgresql)
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "installing system packages: ${missing[*]}"
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
    else
        echo "these system packages are missing, tests that need them will say so: ${missing[*]}" >&2
    fi
fi

stamp=$venv/requirements.txt
if ! cmp -s "$here/requirements.txt" "$stamp"; then
    echo "making a Python environment in $venv"
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$stamp"
fi
