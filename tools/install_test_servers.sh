#!/usr/bin/env bash
# Installs what the tests run and no wheel holds, from Debian's packages: RabbitMQ, and curl
# for the lines that users paste. The tests start private brokers of their own, so the packaged
# service is kept from starting now and at boot; one that an administrator set up before is
# left alone.
set -euo pipefail

readonly server=/usr/lib/rabbitmq/bin/rabbitmq-server
missing=()
[[ -x $server ]] || missing+=(rabbitmq-server)
command -v curl >/dev/null || missing+=(curl)
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null; then
    echo "Tests are skipped that need ${missing[*]}, to be installed by hand." >&2
    exit 0
fi
if ((EUID != 0)); then
    echo "Tests are skipped that need ${missing[*]}; to run them:" >&2
    echo '    sudo make test-servers' >&2
    exit 0
fi

# Debian's packages ask this file whether they may start what they bring.
readonly policy=/usr/sbin/policy-rc.d
made_policy=
cleanup() { [[ -z $made_policy ]] || rm -f "$policy"; }
trap cleanup EXIT
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made_policy=yes
fi

echo "Installing ${missing[*]} from apt" >&2
log=$(mktemp)
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq "$@" >>"$log" 2>&1
}
if ! { apt update && apt install --yes --no-install-recommends "${missing[@]}"; }; then
    cat "$log" >&2
    echo "apt could not install ${missing[*]}" >&2
    exit 1
fi
rm -f "$log"

if [[ " ${missing[*]} " == *" rabbitmq-server "* && -d /run/systemd/system ]]; then
    systemctl disable --now --quiet rabbitmq-server.service || true
    systemctl disable --now --quiet epmd.service epmd.socket 2>/dev/null || true
fi
[[ -x $server ]]
