"""Alembic's entry; the chassis does the work."""

from chassis.migrations import run_environment
from notify_svc.tables import metadata

run_environment(metadata)
