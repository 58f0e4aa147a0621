#!/usr/bin/env bash
# Refuses files that never belong in a commit. Called with their names, by pre-commit.
set -euo pipefail

readonly size_max_kib=1024
status=0
refuse() {
    printf '%s: %s\n' "$1" "$2" >&2
    status=1
}

for file in "$@"; do
    # Locks are long because they hold a hash for every platform's wheel.
    if (($(stat -c %s "$file") > size_max_kib * 1024)) && [[ $file != requirements*.lock ]]; then
        refuse "$file" "larger than $size_max_kib KiB"
    fi
    grep -qIE -- '-----BEGIN ([A-Z]+ )*PRIVATE KEY-----' "$file" && refuse "$file" 'holds a private key'
    grep -qIE '^(<{7} |>{7} )' "$file" && refuse "$file" 'holds conflict markers'
done
exit "$status"
