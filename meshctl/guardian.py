"""The guardian: a small process that outlives a killed supervisor just long enough to tidy up.

Every child dies with its supervisor already, by the kernel's hand (see `processes`). The guardian
is the second fastener: it reads a pipe whose other end only the supervisor holds. When the pipe
closes without the word ``done``, the supervisor is gone; the guardian then ends, in order, whatever
of the mesh is still there, and takes the status file away. It never ends anything while the
supervisor lives.

Run as ``python -m meshctl.guardian FOLDER STATE_ID CLUSTER`` with the pipe as standard input.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

from meshctl.leftovers import end, processes_of

_GRACE_SECONDS = 6.0
_LOCK_SECONDS = 0.5


def main(folder: Path, state_id: str, cluster: Path) -> int:
    """Waits for the end of the supervisor, and tidies up when it came without a word."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    heard = b""
    while chunk := os.read(sys.stdin.fileno(), 64):
        heard += chunk
    if heard.strip() == b"done":
        return 0
    with (folder / "lock").open("r+") as lock:
        if _locked(lock):
            tidy_up(folder, state_id, cluster)
        # Else the next supervisor is here already, and does the same at its start.
    return 0


def _locked(lock: IO[str]) -> bool:
    # A `meshctl status` that looks whether the lock is held holds it itself for a moment.
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        else:
            return True


def tidy_up(folder: Path, state_id: str, cluster: Path) -> None:
    """Ends what is left of a mesh whose supervisor is dead; the caller holds the lock."""
    left = processes_of(state_id, cluster)
    killed = end(left, within_seconds=_GRACE_SECONDS)
    # A kill may have uncovered more, such as a broker's helpers.
    end(processes_of(state_id, cluster), within_seconds=0.5)
    (folder / "run.json").unlink(missing_ok=True)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with (folder / "events.log").open("a") as log:
        log.write(
            f"{now} the supervisor was killed; ended {len(left)} processes it left"
            f" ({len(killed)} by force)\n"
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
