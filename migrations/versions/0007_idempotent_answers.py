"""Answers of POST requests with an `Idempotency-Key`.

Revision: 0007; after: 0002.
"""

import sqlalchemy as sa
from alembic import op

from persistence.column_types import UtcDateTime

revision = "0007"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotent_answers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("sealed_answer", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_idempotent_answers")),
    )
    with op.batch_alter_table("idempotent_answers", schema=None) as batch_op:
        batch_op.create_index(op.f("ix_idempotent_answers_created_at"), ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_table("idempotent_answers")
