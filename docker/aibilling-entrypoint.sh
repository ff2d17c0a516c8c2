#!/bin/sh
# What aibilling_polar needs before the official image's entry point takes over: the token in a file that only the
# server's user can read, which a mounted secret is not, and the databases that get a worker.
set -eu

secret=${AIBILLING_TOKEN_FILE:-/run/secrets/polar_token}
token=/var/run/postgresql/polar.token

if [ -e "$secret" ] || [ -n "${AIBILLING_TOKEN_FILE:-}" ]; then
	rm -f "$token"
	(umask 077 && cat "$secret" >"$token")
	[ "$(id -u)" -ne 0 ] || chown postgres: "$token"
fi

# As there, options alone are the server's.
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
	set -- postgres "$@"
fi
if [ "$1" = postgres ] && [ -n "${AIBILLING_DATABASES:-}" ]; then
	set -- "$@" -c "aibilling_polar.databases=$AIBILLING_DATABASES"
fi
exec docker-entrypoint.sh "$@"
