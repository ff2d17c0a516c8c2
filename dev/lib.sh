# shellcheck shell=bash
# Shared by the scripts in dev/: what is needed from Debian's packages, a private copy of
# PostgreSQL with the extension in it, and a place where an unprivileged server can work.
#
# Sets: root (the checkout), major, pfx_bin (programs of the private copy), pgxs_test (the
# server's test tools), work (temporary directory, removed at exit).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${AIBILLING_CACHE:-$root/.cache}
work=

# Nothing of the caller's environment decides which server or which Polar is talked to.
for name in $(compgen -e PG || true); do
	case $name in PG_CONFIG) ;; *) unset "$name" ;; esac
done
export LC_ALL=C.UTF-8

say() { printf '%s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# as_admin COMMAND...: with the right to install packages.
as_admin() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		die "packages must be installed: run this as root, or install sudo"
	fi
}

# as_server COMMAND...: as the user that server processes run under.  PostgreSQL refuses root.
as_server() {
	if [ "$(id -u)" -eq 0 ]; then
		runuser -u postgres -- env HOME="${work:-/tmp}" "$@"
	else
		"$@"
	fi
}

# A server that one can build for: programs, headers and test tools are all there.
is_complete() {
	local dir
	dir=$("$1" --bindir 2>/dev/null) && [ -x "$dir/postgres" ] && [ -x "$dir/initdb" ] &&
		[ -f "$("$1" --pgxs)" ] && [ -f "$("$1" --includedir-server)/postgres.h" ]
}

# Chooses the server: PG_CONFIG if given, else the newest complete one, else the distribution's.
# Sets pg_config and major; pg_config need not exist yet.
choose_server() {
	local candidate
	pg_config=
	if [ -n "${PG_CONFIG:-}" ]; then
		pg_config=$PG_CONFIG
		if command -v "$pg_config" >/dev/null; then
			major=$("$pg_config" --version | sed 's/^[^0-9]*\([0-9]*\).*/\1/')
		elif [[ $pg_config =~ ^/usr/lib/postgresql/([0-9]+)/bin/pg_config$ ]]; then
			major=${BASH_REMATCH[1]}
		else
			die "PG_CONFIG: no such program: $pg_config"
		fi
	else
		while read -r candidate; do
			if is_complete "$candidate"; then
				pg_config=$candidate
			fi
		done < <(find /usr/lib/postgresql -mindepth 3 -maxdepth 3 -path '*/bin/pg_config' 2>/dev/null | sort -V)
		if [ -n "$pg_config" ]; then
			major=$("$pg_config" --version | sed 's/^[^0-9]*\([0-9]*\).*/\1/')
		else
			command -v apt-cache >/dev/null ||
				die "no PostgreSQL with its server headers found, and this is no Debian: set PG_CONFIG"
			refresh_packages
			major=$(apt-cache depends postgresql | sed -n 's/^ *Depends: postgresql-\([0-9]*\)$/\1/p' | head -n 1)
			[ -n "$major" ] || die "the distribution has no package postgresql: set PG_CONFIG"
			pg_config=/usr/lib/postgresql/$major/bin/pg_config
		fi
	fi
	[ "$major" -ge 15 ] || die "PostgreSQL 15 or later is needed, found $major: set PG_CONFIG"
}

packages_fresh=
refresh_packages() {
	[ -z "$packages_fresh" ] || return 0
	say "== fetching the list of packages"
	as_admin apt-get -qq update
	packages_fresh=1
}

# watch LOG COMMAND...: runs it with its output in LOG.
watch() {
	local log=$1 started=$SECONDS
	shift
	"$@" >"$log" 2>&1 &
	watch_process "$log" "$!" "$started" || return
	say "   done in $((SECONDS - started)) s"
}

# watch_process LOG PID STARTED: waits for a process of ours.  Meanwhile, on a terminal, a line that lives: the seconds
# since then, and what the log says last.
watch_process() {
	local log=$1 pid=$2 started=$3 status=0
	if [ -t 1 ]; then
		while kill -0 "$pid" 2>/dev/null; do
			printf '\r\033[K   %3d s  %.60s' "$((SECONDS - started))" "$(tail -c 300 "$log" | tr -c '[:print:]\n' ' ' | tail -n 1)"
			sleep 0.3
		done
		printf '\r\033[K'
	fi
	wait "$pid" || status=$?
	return "$status"
}

# Debian's package of a server makes a cluster and starts it at once.  We need none, so none is made where there is
# no server yet; whoever installs another one later gets theirs.
no_cluster=/etc/postgresql-common/createcluster.d/aibilling-polar-none.conf
without_cluster() {
	as_admin sh -c "mkdir -p '$(dirname "$no_cluster")' && echo 'create_main_cluster = false' >'$no_cluster'"
	as_admin env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
		-o Dpkg::Use-Pty=0 install "$@" || { as_admin rm -f "$no_cluster"; return 1; }
	as_admin rm -f "$no_cluster"
}

# Installs what is missing; asks no network when nothing is.
install_packages() {
	local missing=()

	command -v make >/dev/null && command -v cc >/dev/null || missing+=(build-essential)
	command -v pkg-config >/dev/null && pkg-config --exists libcurl || missing+=(pkg-config libcurl4-openssl-dev)
	command -v python3 >/dev/null || missing+=(python3)
	command -v openssl >/dev/null || missing+=(openssl)
	[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
	perl -MIPC::Run -MTest::More -e 1 2>/dev/null || missing+=(libipc-run-perl)
	is_complete "$pg_config" || missing+=("postgresql-$major" "postgresql-server-dev-$major")

	[ "${#missing[@]}" -gt 0 ] || return 0
	command -v apt-get >/dev/null || die "missing, by the names of Debian's packages: ${missing[*]}"
	refresh_packages
	say "== installing from the distribution's packages:"
	printf '%s\n' "${missing[*]}" | fold -s -w 76 | sed 's/^/   /'
	{ as_admin env LC_ALL=C apt-get --no-install-recommends --assume-no install "${missing[@]}" 2>/dev/null || true; } |
		sed -n 's/^\(Need to get .*\|After this operation, .*\)$/   \1/p'
	mkdir -p "$cache"
	watch "$cache/install.log" without_cluster "${missing[@]}" ||
		{ tail -n 30 "$cache/install.log" >&2; die "could not install the packages"; }
	is_complete "$pg_config" || die "$pg_config is not a server with headers (PostgreSQL $major)"
}

# The longest directory that holds all of the arguments.
common_directory() {
	local prefix=$1 path
	for path in "$@"; do
		while [[ $path/ != "$prefix"/* ]]; do
			prefix=${prefix%/*}
		done
	done
	printf '%s\n' "$prefix"
}

# A copy of the server below .cache/, into which the extension is installed: a server finds
# its files relative to its programs, so a copy of the same shape works anywhere, and the
# system's PostgreSQL is left alone.  Copied anew when the packages change, and then the
# extension is built anew: find_copy drops both, copy_server copies.
find_copy() {
	local dir
	mapfile -t server_dirs < <(for dir in bindir pkglibdir sharedir includedir-server; do
		realpath "$("$pg_config" --$dir)"
	done)
	server_prefix=$(common_directory "${server_dirs[@]}")
	pfx=$cache/pg$major/server
	pfx_bin=$pfx${server_dirs[0]#"$server_prefix"}
	server_stamp="$("$pg_config" --version) ${server_dirs[*]} $(stat -c %Y "${server_dirs[0]}/postgres")"
	[ "$(cat "$cache/pg$major/stamp" 2>/dev/null)" = "$server_stamp" ] || rm -rf "$cache/pg$major"
}

copy_server() {
	local dir

	if [ ! -e "$cache/pg$major/stamp" ]; then
		say "== copying PostgreSQL $major"
		mkdir -p "$pfx"
		for dir in "${server_dirs[@]}"; do
			mkdir -p "$pfx${dir#"$server_prefix"}"
			cp -aL --no-preserve=ownership "$dir/." "$pfx${dir#"$server_prefix"}"
		done
		# Its own copy of the extension, if the system has one, is not ours.
		find "$pfx" -name 'aibilling_polar*' -exec rm -rf {} +
		printf '%s\n' "$server_stamp" >"$cache/pg$major/stamp"
	fi
	pgxs_test=$(dirname "$("$pfx_bin/pg_config" --pgxs)")/../test
	# dev/sanitize: servers start through this script, under the name that all tools call.
	if [ -n "${AIBILLING_POSTGRES:-}" ]; then
		[ -e "$pfx_bin/postgres.real" ] || mv "$pfx_bin/postgres" "$pfx_bin/postgres.real"
		install -m 755 "$AIBILLING_POSTGRES" "$pfx_bin/postgres"
	fi
}

# Copies what the Makefile reads to a directory of this major's own and starts to build there, so that objects of two
# majors never mix and a build as root leaves no file in the source directories.  finish_build waits for it.
start_build() {
	local file
	build=$cache/pg$major/build
	build_log=$cache/pg$major/build.log
	# By the original's pg_config: the copy's path may have a blank, with which PGXS cannot work.
	build_make=(make -C "$build" PG_CONFIG="$pg_config" with_llvm=no)

	mkdir -p "$build"
	cd "$root"
	for file in Makefile aibilling_polar.control src/*.[ch] src/*/*.[ch] sql/*--*.sql sql/*/*.sql data/*.json; do
		if [ -f "$file" ] && ! cmp -s "$file" "$build/$file"; then
			mkdir -p "$build/$(dirname "$file")"
			cp "$file" "$build/$file"
		fi
	done
	(cd "$build" && printf '%s\n' src/*.[ch] src/*/*.[ch] sql/*.sql sql/*/*.sql data/*.json) | while read -r file; do
		[ -f "$file" ] || rm -f "$build/$file"
	done
	build_pid=
	build_started=$SECONDS
	: >"$build_log"
	if ! "${build_make[@]}" -q all >/dev/null 2>&1; then
		say "== building the extension"
		"${build_make[@]}" -j "$(nproc)" all >"$build_log" 2>&1 &
		build_pid=$!
	fi
}

# Waits for what start_build has started, and installs it into the copy of the server.
finish_build() {
	local built=0
	if [ -n "$build_pid" ]; then
		watch_process "$build_log" "$build_pid" "$build_started" || built=$?
		[ "$built" -ne 0 ] || say "   built in $((SECONDS - build_started)) s"
	fi
	if [ "$built" -ne 0 ] ||
		! "${build_make[@]}" pkglibdir="$("$pfx_bin/pg_config" --pkglibdir)" \
			datadir="$("$pfx_bin/pg_config" --sharedir)" install >>"$build_log" 2>&1; then
		grep -A 5 -E '(error|warning):|undefined reference' "$build_log" >&2 || tail -n 20 "$build_log" >&2
		die "the build failed: see .cache/pg$major/build.log"
	fi
	grep -E 'warning:' "$build_log" >&2 || true
}

# All of the above.
setup() {
	choose_server
	install_packages
	find_copy
	start_build
	copy_server
	finish_build
	say "== aibilling_polar is installed in a private copy of PostgreSQL $major"
}

# Makes $work: a directory that the server's user can enter and write to, wherever the
# checkout lies, and removes it at exit together with any server that still runs in it.
make_work_directory() {
	if [ "$(id -u)" -eq 0 ] && ! id postgres >/dev/null 2>&1; then
		useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin --user-group postgres
	fi
	work=$(mktemp -d /tmp/aibilling.XXXXXX)
	trap 'remove_work_directory' EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	chmod 755 "$work"
	if [ "$(id -u)" -eq 0 ]; then
		chown postgres: "$work"
	fi
	# The private copy may lie where the server's user cannot go, such as root's home.
	if ! (cd / && as_server test -r "$pfx_bin/postgres"); then
		cp -a "$pfx" "$work/server"
		pfx_bin=$work/server${pfx_bin#"$pfx"}
		pgxs_test=$work/server${pgxs_test#"$pfx"}
	fi
	cd "$work"
}

# A helper process that ends when its input is closed: the descriptor and the process.
helper_input=
helper_pid=
remove_work_directory() {
	local status=$? file
	trap - EXIT HUP INT TERM
	find "$work" -name postmaster.pid 2>/dev/null | while read -r file; do
		as_server "$pfx_bin/pg_ctl" -D "$(dirname "$file")" -m immediate stop >/dev/null 2>&1 || true
	done
	if [ -n "$helper_input" ]; then
		exec {helper_input}>&-
		wait "$helper_pid" || true
	fi
	cd /
	if mountpoint -q "$work/small-disk" 2>/dev/null; then
		umount "$work/small-disk"
	fi
	rm -rf "$work"
	exit "$status"
}

# Chromium for pictures and for t/082_report.pl: installs Debian's package where it is missing.
need_chromium() {
	command -v chromium >/dev/null && return
	command -v apt-get >/dev/null || die "missing: chromium"
	refresh_packages
	say "== installing chromium"
	as_admin env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 \
		install chromium fonts-dejavu-core >/dev/null
}

# Prometheus' promtool and the exporter, for t/083_monitoring.pl.
need_monitoring() {
	command -v promtool >/dev/null && command -v prometheus-postgres-exporter >/dev/null && return
	command -v apt-get >/dev/null || die "missing: prometheus, prometheus-postgres-exporter"
	refresh_packages
	say "== installing prometheus-postgres-exporter and promtool"
	as_admin env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 \
		install prometheus prometheus-postgres-exporter >/dev/null
}

# chromium_headless OPTION...: without a screen, a network or a profile that stays.
chromium_headless() {
	local log=$work/chromium.log

	as_server env HOME="$work" timeout 120 chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
		--user-data-dir="$work/chromium" --timeout=20000 "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; die "chromium failed"; }
}
