"""`python -m order_svc serve|consume|relay|sweep|migrate|all`."""

from chassis.runtime import main
from order_svc.settings import OrderSettings
from order_svc.wiring import NAME, build, prepare

if __name__ == "__main__":
    raise SystemExit(main(NAME, settings_type=OrderSettings, build=build, migrate=prepare))
