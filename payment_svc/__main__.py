"""`python -m payment_svc serve|consume|relay|sweep|migrate|all`."""

from chassis.runtime import main
from payment_svc.settings import PaymentSettings
from payment_svc.wiring import NAME, build, prepare

if __name__ == "__main__":
    raise SystemExit(main(NAME, settings_type=PaymentSettings, build=build, migrate=prepare))
