# Starts Patroni in place of this shell. Passwords come from files and reach only this process.
set -eu
secret() { cat "/etc/collab/database/$1"; }
PATRONI_SUPERUSER_PASSWORD="$(secret superuser-password)"
PATRONI_REPLICATION_PASSWORD="$(secret replication-password)"
PATRONI_RESTAPI_PASSWORD="$PATRONI_SUPERUSER_PASSWORD"
export PATRONI_SUPERUSER_PASSWORD PATRONI_REPLICATION_PASSWORD PATRONI_RESTAPI_PASSWORD

# Data of an older major version is opened by that version for as long as the image has it.
data=/var/lib/postgresql/data/pgdata
if [ -f "$data/PG_VERSION" ]; then
    PATRONI_POSTGRESQL_BIN_DIR="/usr/lib/postgresql/$(cat "$data/PG_VERSION")/bin"
else
    PATRONI_POSTGRESQL_BIN_DIR="$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)"
fi
export PATRONI_POSTGRESQL_BIN_DIR PATH="$PATRONI_POSTGRESQL_BIN_DIR:$PATH"

# The kubelet may have given the group rights on the volume, which Postgres refuses.
if [ -d "$data" ]; then chmod 0700 "$data"; fi

exec patroni /etc/collab/patroni/patroni.yml
