#!/bin/sh
# Run once by the postgres image, on an empty data folder: a role and a database of its
# own for each service, which no other service can open.
set -eu

database() { # name, password
    psql --set=ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
        --set=name="$1" --set=password="$2" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

database order "$ORDER_DB_PASSWORD"
database payment "$PAYMENT_DB_PASSWORD"
database notification "$NOTIFICATION_DB_PASSWORD"
