"""`python -m rates_svc serve|all`; the other roles have nothing to do here."""

from chassis.runtime import main
from rates_svc.settings import RatesSettings
from rates_svc.wiring import NAME, build

if __name__ == "__main__":
    raise SystemExit(main(NAME, settings_type=RatesSettings, build=build))
