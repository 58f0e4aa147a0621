"""Alembic's entry; the chassis does the work."""

from chassis.migrations import run_environment
from payment_svc.tables import metadata

run_environment(metadata)
