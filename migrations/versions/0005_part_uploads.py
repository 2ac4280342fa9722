"""Uploads in chunks: what has come of each.

Revision: 0005; after: 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "part_uploads",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("assignment_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("chunk_bytes", sa.BigInteger(), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignments.id"], name=op.f("fk_part_uploads_assignment_id_assignments")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_part_uploads")),
        sa.UniqueConstraint("assignment_id", "kind", name=op.f("uq_part_uploads_assignment_id_kind")),
    )
    with op.batch_alter_table("part_uploads", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_part_uploads_touched_at"), ["touched_at"], unique=False)
    op.create_table(
        "upload_chunks",
        sa.Column("upload_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["part_uploads.id"], name=op.f("fk_upload_chunks_upload_id_part_uploads")
        ),
        sa.PrimaryKeyConstraint("upload_id", "number", name=op.f("pk_upload_chunks")),
    )


def downgrade() -> None:
    op.drop_table("upload_chunks")
    with op.batch_alter_table("part_uploads", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_part_uploads_touched_at"))
    op.drop_table("part_uploads")
