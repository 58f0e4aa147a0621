#!/usr/bin/env bash
# Builds the image where no Docker engine is at hand, and starts each of its commands.
#
# Needs Debian and root: buildah and debootstrap are installed when they are missing. The
# base is made from Debian's own packages instead of being pulled. About five minutes and
# 3 GB of disk; nothing is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! { command -v buildah && command -v debootstrap; } >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        buildah debootstrap >/dev/null
fi

scratch=$(mktemp -d)
store=(--root "$scratch/store" --runroot "$scratch/run" --storage-driver vfs)
trap 'rm -rf "$scratch"' EXIT
policy=$scratch/policy.json
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$policy"

echo "making a base of Debian 12 with Python 3.11"
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$scratch/root" >"$scratch/debootstrap.log" ||
    { tail -n 20 "$scratch/debootstrap.log" >&2; exit 1; }
# What makes package indexes reachable from here must reach the build as well: a mirror may
# be signed by an authority that only this machine trusts.
mkdir -p "$scratch/root/etc/uv"
echo 'system-certs = true' >"$scratch/root/etc/uv/uv.toml"
for file in /etc/pip.conf /etc/resolv.conf; do
    [ -f "$file" ] && cp --remove-destination "$file" "$scratch/root$file"
done
cp -r /etc/ssl/certs/. "$scratch/root/etc/ssl/certs/"
base=$(buildah "${store[@]}" from scratch)
buildah "${store[@]}" add --quiet "$base" "$scratch/root" / >/dev/null
buildah "${store[@]}" commit --quiet --signature-policy "$policy" "$base" localhost/base >/dev/null
buildah "${store[@]}" rm "$base" >/dev/null
rm -rf "$scratch/root"

echo "building the image"
buildah "${store[@]}" bud --isolation chroot --signature-policy "$policy" \
    --build-arg BASE=localhost/base --tag localhost/ordermesh . \
    >"$scratch/build.log" 2>&1 || { tail -n 30 "$scratch/build.log" >&2; exit 1; }

container=$(buildah "${store[@]}" from --signature-policy "$policy" localhost/ordermesh)
run() { buildah "${store[@]}" run --isolation chroot "$container" -- "$@"; }
echo "who runs it: uid $(run python -c 'import os; print(os.getuid())')"
for module in order_svc payment_svc notify_svc rates_svc simulators.mail meshctl; do
    run python -m "$module" --help >/dev/null && echo "ok  python -m $module"
done
run python -m meshctl credentials /var/lib/ordermesh/tls
run test -s /var/lib/ordermesh/tls/jwks.json && echo "ok  credentials are written by that user"
buildah "${store[@]}" images localhost/ordermesh
