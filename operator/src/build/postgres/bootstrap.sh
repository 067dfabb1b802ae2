# Runs once, when the database has been created: makes the role and the database of the nodes.
# Patroni passes a connection string whose password stands in PGPASSFILE.
set -eu
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 "$1" <<'END'
\set password `cat /etc/collab/database/password`
create role collab login password :'password';
create database collab owner collab;
END
