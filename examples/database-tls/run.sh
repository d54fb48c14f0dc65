#!/bin/bash
# psql logs in to PostgreSQL with the certificate of a `database` output (clientcert=verify-full).
. "$(dirname "$0")/../lib.sh"
db_port=${DB_PORT:-5432}
PATH=$PATH:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':')
sed -i "s|/opt/example|$work|g" server.yaml

# PostgreSQL does not run as root.
as_postgres=()
if [ "$(id -u)" = 0 ]; then as_postgres=(setpriv --reuid=postgres --regid=postgres --clear-groups); fi

say "a database, who may use it, and who may serve it"
start_cluster
cluster create -f resources.yaml
cluster get db

say "the client's files"
once client
ls client

say "PostgreSQL, with an SVID, and with the cluster's users for clients"
chmod 0711 "$work"
install -d -m 0700 data
if [ "$(id -u)" = 0 ]; then chown postgres:postgres data; fi
"${as_postgres[@]}" initdb -D data --auth=trust --username=postgres > initdb.log
cat >> data/postgresql.conf <<EOF
listen_addresses = 'localhost'
port = $db_port
unix_socket_directories = '$work/data'
ssl = on
ssl_cert_file = 'svid.pem'
ssl_key_file = 'svid_key.pem'
ssl_ca_file = 'clients.pem'
EOF
# A certificate names the bot; the map says which database user that is.
cat > data/pg_hba.conf <<EOF
local all postgres trust
hostssl orders reader 127.0.0.1/32 cert clientcert=verify-full map=bots
hostssl orders reader ::1/128 cert clientcert=verify-full map=bots
EOF
echo "bots bot-client reader" > data/pg_ident.conf
install -m 0644 client/teleport-user-ca.crt data/clients.pem
background server-agent "$tbot" start -c server.yaml --proxy-server "localhost:$port" --join-method token \
    --token "$(invite server)"
until_ok test -s data/svid_key.pem
background postgres "${as_postgres[@]}" env OPENSSL_CONF="$work/openssl.cnf" postgres -D data
admin() { psql -qAt -h "$work/data" -p "$db_port" -U postgres "$@"; }
until_ok admin -c 'select 1'
admin -c 'create database orders' -c 'create role reader login'

say "psql, and the server as strictly judged as the client"
ask() {
    psql -qAt "host=localhost port=$db_port dbname=orders user=${1:-reader} sslmode=verify-full \
        sslrootcert=server/svid_bundle.pem sslcert=client/tls.crt sslkey=client/tls.key" \
        -c "select 'hello ' || current_user || ', you are ' || client_dn from pg_stat_ssl where pid = pg_backend_pid()"
}
ask | cut -c 1-60

say "as another user there is nothing to see"
if ask postgres 2> refused.log; then exit 1; fi
cat refused.log

say "a new certificate reaches PostgreSQL by itself"
serial() {
    openssl s_client -starttls postgres -connect "localhost:$db_port" < /dev/null 2> /dev/null \
        | openssl x509 -noout -serial
}
before=$(serial)
kill -HUP "${children[1]}"
changed() { [ "$(serial)" != "$before" ]; }
until_ok changed
echo "was $before, is $(serial)"
ask | cut -c 1-60
