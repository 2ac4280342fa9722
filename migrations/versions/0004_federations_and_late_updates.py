"""Federations; attempts, late updates, pauses, rollbacks.

Revision: 0004; after: 0003.

Every device, token and run that is here already belongs to the federation `default`.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
RUNS_KEY = "fk_runs_federation_federations"
USED_IN_KEY = "fk_assignments_used_in_round_id_rounds"
ROUNDS_BEFORE, ROUNDS_AFTER = "uq_rounds_run_id_number", "uq_rounds_run_id_number_attempt"


def upgrade() -> None:
    op.create_table(
        "federations",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("description", sa.String(length=400), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_federations")),
    )
    op.create_table(
        "federation_devices",
        sa.Column("federation", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=64), nullable=False),
        sa.Column("joined_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_federation_devices_device_id_devices")),
        sa.ForeignKeyConstraint(
            ["federation"], ["federations.name"], name=op.f("fk_federation_devices_federation_federations")
        ),
        sa.PrimaryKeyConstraint("federation", "device_id", name=op.f("pk_federation_devices")),
    )
    op.create_index(op.f("ix_federation_devices_device_id"), "federation_devices", ["device_id"])
    op.execute(
        "INSERT INTO federations (name, description, created_at) "
        "VALUES ('default', 'Every device and run that names no other', CURRENT_TIMESTAMP)"
    )
    op.execute(
        "INSERT INTO federation_devices (federation, device_id, joined_at) "
        "SELECT 'default', id, enrolled_at FROM devices"
    )
    _add_to_runs_and_tokens()
    _add_to_rounds()
    _add_to_assignments()
    with op.batch_alter_table("versions") as table:
        table.add_column(sa.Column("parent", sa.Integer(), nullable=True))
        table.add_column(sa.Column("withdrawn_at", TIME, nullable=True))
        table.add_column(sa.Column("withdrawn_reason", sa.String(length=2000), nullable=True))
    op.execute("UPDATE versions SET parent = (SELECT base_version FROM rounds WHERE rounds.id = versions.round_id)")
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("status_since", TIME, nullable=True))


def _add_to_runs_and_tokens() -> None:
    with op.batch_alter_table("runs") as table:
        table.add_column(sa.Column("federation", sa.String(length=64), nullable=False, server_default="default"))
        table.add_column(sa.Column("paused_at", TIME, nullable=True))
        table.add_column(sa.Column("paused_by", sa.String(length=200), nullable=True))
        table.create_foreign_key(op.f(RUNS_KEY), "federations", ["federation"], ["name"])
        table.create_index(op.f("ix_runs_federation"), ["federation"])
    with op.batch_alter_table("runs") as table:
        table.alter_column("federation", server_default=None)
    with op.batch_alter_table("enrolment_tokens") as table:
        table.add_column(sa.Column("federations", sa.JSON(), nullable=False, server_default='["default"]'))
    with op.batch_alter_table("enrolment_tokens") as table:
        table.alter_column("federations", server_default=None)


def _add_to_rounds() -> None:
    with op.batch_alter_table("rounds") as table:
        table.add_column(sa.Column("attempt", sa.Integer(), nullable=False, server_default="1"))
        table.add_column(sa.Column("sampling_until", TIME, nullable=True))
        table.drop_constraint(op.f(ROUNDS_BEFORE), type_="unique")
        table.create_unique_constraint(op.f(ROUNDS_AFTER), ["run_id", "number", "attempt"])
    with op.batch_alter_table("rounds") as table:
        table.alter_column("attempt", server_default=None)


def _add_to_assignments() -> None:
    with op.batch_alter_table("assignments") as table:
        table.add_column(sa.Column("late_use", sa.String(length=16), nullable=True))
        table.add_column(sa.Column("used_in_round_id", sa.String(length=64), nullable=True))
        table.add_column(sa.Column("staleness", sa.Integer(), nullable=True))
        table.create_foreign_key(op.f(USED_IN_KEY), "rounds", ["used_in_round_id"], ["id"])
        table.create_index(op.f("ix_assignments_run_id_status"), ["run_id", "status"])
        table.create_index(op.f("ix_assignments_used_in_round_id"), ["used_in_round_id"])


def downgrade() -> None:
    """Further attempts at a round cannot be told apart any more, so there must be none."""
    with op.batch_alter_table("jobs") as table:
        table.drop_column("status_since")
    with op.batch_alter_table("versions") as table:
        for column in ("withdrawn_reason", "withdrawn_at", "parent"):
            table.drop_column(column)
    with op.batch_alter_table("assignments") as table:
        table.drop_index(op.f("ix_assignments_used_in_round_id"))
        table.drop_index(op.f("ix_assignments_run_id_status"))
        table.drop_constraint(op.f(USED_IN_KEY), type_="foreignkey")
        for column in ("staleness", "used_in_round_id", "late_use"):
            table.drop_column(column)
    with op.batch_alter_table("rounds") as table:
        table.drop_constraint(op.f(ROUNDS_AFTER), type_="unique")
        table.create_unique_constraint(op.f(ROUNDS_BEFORE), ["run_id", "number"])
        table.drop_column("sampling_until")
        table.drop_column("attempt")
    with op.batch_alter_table("enrolment_tokens") as table:
        table.drop_column("federations")
    with op.batch_alter_table("runs") as table:
        table.drop_index(op.f("ix_runs_federation"))
        table.drop_constraint(op.f(RUNS_KEY), type_="foreignkey")
        for column in ("paused_by", "paused_at", "federation"):
            table.drop_column(column)
    op.drop_table("federation_devices")
    op.drop_table("federations")
