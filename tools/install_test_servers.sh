#!/usr/bin/env bash
# Installs what the tests run and no wheel holds: RabbitMQ, from Debian's packages.
# The tests start private brokers of their own, so the packaged service is kept from
# starting now and at boot; one that an administrator set up before is left alone.
set -euo pipefail

readonly server=/usr/lib/rabbitmq/bin/rabbitmq-server
[[ -x $server ]] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "The tests of the RabbitMQ broker need rabbitmq-server 3.10 or newer, installed by hand." >&2
    exit 0
fi
if ((EUID != 0)); then
    echo 'The tests of the RabbitMQ broker are skipped; to run them:' >&2
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

echo 'Installing rabbitmq-server from apt' >&2
log=$(mktemp)
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq "$@" >>"$log" 2>&1
}
if ! { apt update && apt install --yes --no-install-recommends rabbitmq-server; }; then
    cat "$log" >&2
    echo "apt could not install rabbitmq-server" >&2
    exit 1
fi
rm -f "$log"

if [[ -d /run/systemd/system ]]; then
    systemctl disable --now --quiet rabbitmq-server.service || true
    systemctl disable --now --quiet epmd.service epmd.socket 2>/dev/null || true
fi
[[ -x $server ]]
