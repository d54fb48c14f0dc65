#!/bin/sh
# Gives PostgreSQL its certificate: it wants files of its own, closed to others, and to be told.
set -eu
cd "$1"
owner=$(stat -c %u:%g data)
for file in svid.pem svid_key.pem; do
    install -m 0600 "server/$file" "data/$file.new"
    chown "$owner" "data/$file.new"
    mv "data/$file.new" "data/$file"
done
if [ -s data/postmaster.pid ]; then kill -HUP "$(head -n 1 data/postmaster.pid)"; fi
