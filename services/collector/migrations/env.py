"""What Alembic runs. The connection comes from `database.migrate`: all versions are applied in its transaction."""

from __future__ import annotations

from alembic import context

from services.collector.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
