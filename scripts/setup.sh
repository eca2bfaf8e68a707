# Set-up, sourced by the scripts beside it: `outrider_setup [--no-broker|--broker-optional] [--postgres] [extra …]`.
#
# Makes `.venv` from requirements.lock (uv if it is on the PATH, else pip) and sees to the system packages. A second
# run finds the stamp and returns at once. Rules: nothing is written outside the project's folder except by apt; two
# set-ups at once wait for each other; a killed set-up leaves no long-lived child, and the next one starts over.
# `outrider_setup` returns 1 after one clear line on stderr. Extras (`fl`, `ray`, …) beyond the lock come from
# constraints.txt.

OUTRIDER_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
OUTRIDER_PYTHON="$OUTRIDER_ROOT/.venv/bin/python"
export OUTRIDER_ROOT OUTRIDER_PYTHON

# Ctrl-C ends a script with 130 once the child that it reached has ended, not with that child's own complaint.
trap 'exit 130' INT

_outrider_say() { printf 'set-up: %s\n' "$*" >&2; }

# Runs a command that must not outlive this script, with every cache inside the folder.
_outrider_leashed() {
    local leash=()
    if setpriv --pdeathsig KILL true 2>/dev/null; then leash=(setpriv --pdeathsig KILL --); fi
    env -u PYTHONPATH -u PYTHONHOME -u VIRTUAL_ENV -u PIP_TARGET -u PIP_PREFIX -u PIP_USER \
        TMPDIR="$OUTRIDER_ROOT/.cache/tmp" UV_CACHE_DIR="$OUTRIDER_ROOT/.cache/uv" UV_PYTHON_DOWNLOADS=never \
        PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
        "${leash[@]}" "$@"
}

# The first interpreter on the PATH that is new enough; empty when there is none.
_outrider_find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
    done
}

# Where mosquitto is; its folder is often not on a user's PATH.
_outrider_find_broker() { PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v mosquitto; }

# Where PostgreSQL's server programs are: Debian keeps them out of the PATH.
_outrider_find_postgres() {
    local folder
    command -v initdb && return 0
    for folder in /usr/lib/postgresql/*/bin; do
        if [ -x "$folder/initdb" ]; then printf '%s\n' "$folder/initdb"; return 0; fi
    done
    return 1
}

# Installs system packages, or fails without a word when that is not permitted here.
_outrider_apt() {
    local sudo=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    _outrider_say "installing $* (apt)"
    # A process of its own that finishes although this script is killed: a dpkg that stops halfway breaks the system.
    # No service is started (policy-rc.d, ours only for the moment) and none is left enabled.
    "${sudo[@]}" sh -s -- "$@" >"$OUTRIDER_ROOT/.cache/apt.log" 2>&1 <<'INSTALL'
trap '' INT HUP TERM
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
policy=/usr/sbin/policy-rc.d
ours=no
if [ ! -e "$policy" ]; then
    ours=yes
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
fi
# Debian would make a database cluster of the machine's own, which nobody asked for.
cluster=/etc/postgresql-common/createcluster.d/outrider.conf
case " $* " in
*" postgresql "*)
    mkdir -p "${cluster%/*}" && printf 'create_main_cluster = false\n' >"$cluster"
    ;;
esac
install() {
    timeout 300 apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=60 "$@" </dev/null
}
install "$@" || { timeout 300 apt-get update -q </dev/null && install "$@"; }
status=$?
case " $* " in
*" mosquitto "*)
    if [ -d /run/systemd/system ]; then
        systemctl disable mosquitto.service
    elif command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper disable mosquitto.service
    fi
    if command -v update-rc.d >/dev/null; then update-rc.d mosquitto disable; fi
    ;;
*" postgresql "*)
    if [ -d /run/systemd/system ]; then
        systemctl disable postgresql.service
    elif command -v deb-systemd-helper >/dev/null; then
        deb-systemd-helper disable postgresql.service
    fi
    if command -v update-rc.d >/dev/null; then update-rc.d postgresql disable; fi
    rm -f "$cluster"
    rmdir "${cluster%/*}" 2>/dev/null
    ;;
esac
exit "$status"
INSTALL
}

_outrider_broker() {
    [ -z "$(_outrider_find_broker)" ] || return 0
    _outrider_apt mosquitto && [ -n "$(_outrider_find_broker)" ]
}

_outrider_postgres() {
    [ -z "$(_outrider_find_postgres)" ] || return 0
    _outrider_apt postgresql && [ -n "$(_outrider_find_postgres)" ]
}

# Makes an empty .venv with the interpreter "$1"; with uv it needs neither ensurepip nor pip.
_outrider_make_venv() {
    local python="$1"
    if command -v uv >/dev/null; then
        _outrider_leashed uv venv --quiet --clear --no-project --python "$python" "$OUTRIDER_ROOT/.venv"
        return
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        _outrider_apt python3-venv && "$python" -c 'import ensurepip, venv' 2>/dev/null || {
            _outrider_say "$python cannot make a virtual environment; install it: apt-get install python3-venv"
            return 1
        }
    fi
    _outrider_leashed "$python" -m venv --clear "$OUTRIDER_ROOT/.venv"
}

# `_outrider_install ARGUMENTS…`: uv's or pip's install into .venv.
_outrider_install() {
    if command -v uv >/dev/null; then
        _outrider_leashed uv pip install --quiet --compile-bytecode --python "$OUTRIDER_PYTHON" "$@"
    else
        _outrider_leashed "$OUTRIDER_PYTHON" -m pip install -qq "$@"
    fi
}

# What the stamp must say for .venv to be right: dependencies, entry points, interpreter, place, extras.
_outrider_stamp() {
    {
        cat "$OUTRIDER_ROOT/requirements.lock" "$OUTRIDER_ROOT/pyproject.toml"
        "$OUTRIDER_PYTHON" -IS -c 'import sys; print(sys.version, sys.base_prefix)' || return 1
        printf '%s\n' "$OUTRIDER_ROOT" "$@"
    } | sha256sum | cut -d ' ' -f 1
}

_outrider_venv() {
    local root="$OUTRIDER_ROOT" stamp="$OUTRIDER_ROOT/.venv/.outrider-stamp" unfinished="$OUTRIDER_ROOT/.cache/unfinished"
    local python seconds="$SECONDS" extra
    if [ ! -e "$unfinished" ] && [ -x "$OUTRIDER_PYTHON" ] && [ -f "$stamp" ] &&
        [ "$(cat "$stamp")" = "$(_outrider_stamp "$@" 2>/dev/null)" ]; then
        return 0
    fi
    # A set-up that was killed may have left half a package: start over.
    if [ -e "$unfinished" ] || ! "$OUTRIDER_PYTHON" -IS -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$(_outrider_find_python)"
        if [ -z "$python" ]; then
            _outrider_apt python3 python3-venv && python="$(_outrider_find_python)"
            [ -n "$python" ] || {
                _outrider_say "Python 3.11 or newer is needed; install it: apt-get install python3 python3-venv"
                return 1
            }
        fi
        _outrider_say "making .venv with $("$python" --version)"
        : >"$unfinished"
        _outrider_make_venv "$python" || return 1
    fi
    _outrider_say "installing the locked packages (one to three minutes the first time)"
    : >"$unfinished"
    _outrider_install --require-hashes -r "$root/requirements.lock" || {
        # A clean failure (no network, say) breaks nothing that was there; only a killed installer does.
        [ "$?" -ge 128 ] || rm -f "$unfinished"
        _outrider_say "the locked packages could not be installed; the lines above say why"
        return 1
    }
    # The build back-end is in the lock, so the project itself needs no download.
    _outrider_install --no-build-isolation --no-deps --editable "$root" || return 1
    for extra in "$@"; do
        _outrider_install --no-build-isolation --constraint "$root/constraints.txt" --editable "$root[$extra]" || {
            _outrider_say "the extra '$extra' could not be installed; the lines above say why"
            return 1
        }
    done
    "$OUTRIDER_PYTHON" -m compileall -q "$root/shared" "$root/edge_agent" "$root/cloud_hub" >/dev/null || true
    rm -rf "$root/.cache/tmp"
    _outrider_stamp "$@" >"$stamp.new" && mv "$stamp.new" "$stamp" && rm -f "$unfinished"
    _outrider_say "ready after $((SECONDS - seconds)) s"
}

outrider_setup() {
    local broker=required postgres=no status=0 lock
    local extras=()
    while [ "$#" -gt 0 ]; do
        case "$1" in
        --no-broker) broker=no ;;
        --broker-optional) broker=optional ;;
        --postgres) postgres=optional ;;
        *) extras+=("$1") ;;
        esac
        shift
    done
    mkdir -p "$OUTRIDER_ROOT/.cache/tmp" || return 1
    exec {lock}>"$OUTRIDER_ROOT/.cache/setup.lock" || return 1
    if ! flock -n "$lock"; then
        _outrider_say "another set-up is at work in this folder; waiting for it"
        flock "$lock"
    fi
    _outrider_venv "${extras[@]}" || status=1
    if [ "$status" -eq 0 ] && [ "$broker" != no ] && ! _outrider_broker; then
        _outrider_say "mosquitto, the MQTT broker, is missing; install it: apt-get install mosquitto"
        if [ "$broker" = required ]; then status=1; fi
    fi
    if [ "$status" -eq 0 ] && [ "$postgres" != no ] && ! _outrider_postgres; then
        _outrider_say "PostgreSQL is missing, and tests that need one are skipped; install it: apt-get install postgresql"
    fi
    exec {lock}>&-
    return "$status"
}
