"""`python -m notify_svc serve|consume|relay|sweep|migrate|all`; `relay` sends the mails."""

from __future__ import annotations

from chassis.runtime import main
from notify_svc.settings import NotificationSettings
from notify_svc.wiring import NAME, build, prepare

if __name__ == "__main__":
    raise SystemExit(main(NAME, settings_type=NotificationSettings, build=build, migrate=prepare))
