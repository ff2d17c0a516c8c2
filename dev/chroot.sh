# shellcheck shell=bash
# Shared by the scripts in dev/ that work in systems of other releases: makes roots and runs commands in
# them.  Needs root, and dev/lib.sh before it.
#
# Sets: chroots (where the roots are: $CHROOTS, or .cache/chroots).  MIRROR is where packages are fetched
# from; by default where this system's apt does.

[ "$(id -u)" -eq 0 ] || die "$0 must run as root: it makes chroots"
chroots=${CHROOTS:-$cache/chroots}
mkdir -p "$chroots"

find_mirror() {
	if [ -z "${MIRROR:-}" ]; then
		# shellcheck disable=SC2016
		MIRROR=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | sort -u | head -n 1)
	fi
}

# need_programs PROGRAM=PACKAGE...: installs the packages of those that are not there.
need_programs() {
	local pair missing=()
	for pair; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	[ "${#missing[@]}" -gt 0 ] || return 0
	refresh_packages
	say "== installing ${missing[*]}"
	apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 install "${missing[@]}" >/dev/null
}

# make_root SUITE DIRECTORY [PACKAGE...]: a minimal system and these packages, kept once it is complete.  An older
# debootstrap does not know a newer suite, but all are made like sid.
make_root() {
	local suite=$1 dir=$2 log=$2.log scripts=/usr/share/debootstrap/scripts script=() include=()
	shift 2

	[ ! -e "$dir/srv/complete" ] || return 0
	need_programs debootstrap=debootstrap
	find_mirror
	[ -e "$scripts/$suite" ] || script=("$scripts/sid")
	[ $# -eq 0 ] || include=("--include=$(IFS=,; echo "$*")")
	say "== debootstrap $suite"
	rm -rf "$dir"
	debootstrap --variant=minbase "${include[@]}" "$suite" "$dir" "$MIRROR" "${script[@]}" >"$log" 2>&1 ||
		{ tail -n 5 "$log" >&2; die "debootstrap failed: see $log"; }
	# Its apt reaches the mirror as this system's does.
	apt-config dump | grep -E '^Acquire::(Check-Valid-Until|https?::Proxy) ' >"$dir/etc/apt/apt.conf.d/90host" || true
	touch "$dir/srv/complete"
}

# in_root DIRECTORY PLACE [VARIABLE=VALUE...] COMMAND...: there, in the directory PLACE.  The namespaces end with
# the run, and with them its mounts and whatever processes it may have left.
in_root() {
	mkdir -p "$1/dev/shm" "$1/$2"
	# shellcheck disable=SC2016
	unshare --mount --pid --fork --kill-child bash -c '
		dir=$1 place=$2
		shift 2
		mount -t proc proc "$dir/proc" && mount -t tmpfs -o mode=1777,size=1g tmpfs "$dir/dev/shm" &&
			exec chroot "$dir" /usr/bin/env -i -C "/$place" PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"' \
		bash "$@"
}

# install_in DIRECTORY PACKAGE...: by apt, without what is only recommended.
install_in() {
	local dir=$1
	shift
	in_root "$dir" / DEBIAN_FRONTEND=noninteractive \
		apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 install "$@"
}
