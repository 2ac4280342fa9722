"""Whose the kept answers of POST requests are, so that each caller's can be counted.

Revision: 0009; after: 0008.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("idempotent_answers", schema=None) as batch_op:
        batch_op.add_column(sa.Column("caller_sha256", sa.String(length=64), nullable=True))
        batch_op.create_index(
            op.f("ix_idempotent_answers_caller_sha256_created_at"), ["caller_sha256", "created_at"], unique=False
        )


def downgrade() -> None:
    with op.batch_alter_table("idempotent_answers", schema=None) as batch_op:
        batch_op.drop_index(op.f("ix_idempotent_answers_caller_sha256_created_at"))
        batch_op.drop_column("caller_sha256")
