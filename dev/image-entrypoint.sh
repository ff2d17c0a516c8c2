#!/bin/sh
# Installed as docker-entrypoint.sh in the base that dev/image makes where the official image cannot be had: as much
# of what that promises as our image builds on.
set -eu

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
	set -- postgres "$@"
fi
[ "$1" = postgres ] || exec "$@"
if [ "$(id -u)" -eq 0 ]; then
	mkdir -p "$PGDATA"
	chown -R postgres: "$PGDATA"
	exec setpriv --reuid postgres --regid postgres --init-groups "$0" "$@"
fi

# of NAME DEFAULT: the variable, or what is in the file that NAME_FILE names.
of() {
	eval "value=\${$1:-} file=\${$1_FILE:-}"
	# shellcheck disable=SC2154
	if [ -n "$file" ]; then
		cat "$file"
	else
		printf '%s' "${value:-$2}"
	fi
}

if [ ! -s "$PGDATA/PG_VERSION" ]; then
	user=$(of POSTGRES_USER postgres)
	database=$(of POSTGRES_DB "$user")
	password=$(mktemp)
	of POSTGRES_PASSWORD '' >"$password"
	[ -s "$password" ] || { echo "POSTGRES_PASSWORD is not set" >&2; exit 1; }
	# shellcheck disable=SC2086
	initdb -U "$user" --pwfile="$password" ${POSTGRES_INITDB_ARGS:-} >/dev/null
	rm "$password"
	echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
	shift
	# pg_ctl hands them to a shell.
	options=$(for option; do printf "'%s' " "$(printf '%s' "$option" | sed "s/'/'\\\\''/g")"; done)
	pg_ctl -w -o "$options -c listen_addresses='' -p 5432" start
	set -- postgres "$@"
	[ "$database" = postgres ] || createdb -U "$user" "$database"
	for file in /docker-entrypoint-initdb.d/*; do
		case $file in
		*.sh) "$file" ;;
		*.sql) psql -v ON_ERROR_STOP=1 --no-psqlrc -U "$user" -d "$database" -f "$file" ;;
		esac
	done
	pg_ctl -w -m fast stop
fi
exec "$@"
