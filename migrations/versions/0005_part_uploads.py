"""Uploads in chunks: what has come of each; and the worker's rows as artifacts, so that no sweep takes them.

Revision: 0005; after: 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
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

    _register_rows()


def _register_rows() -> None:
    """Register the row files of runs that were prepared before files without a row were swept.

    Their sizes are not known here: 0. Nothing reads the size of such a file from the database.
    """
    metadata = sa.MetaData()
    versions = sa.Table(
        "versions",
        metadata,
        sa.Column("run_id", sa.String),
        sa.Column("number", sa.Integer),
        sa.Column("metrics", sa.JSON),
        sa.Column("created_at", sa.DateTime(timezone=True)),
    )
    artifacts = sa.Table(
        "artifacts",
        metadata,
        sa.Column("sha256", sa.String),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("created_at", sa.DateTime(timezone=True)),
    )
    uses = sa.Table("run_artifacts", metadata, *(sa.Column(name, sa.String) for name in ("sha256", "run_id", "kind")))
    connection = op.get_bind()
    for run_id, metrics, created_at in connection.execute(
        sa.select(versions.c.run_id, versions.c.metrics, versions.c.created_at).where(versions.c.number == 0)
    ).all():
        for sha256 in sorted({each for each in (metrics.get("rows") or {}).values() if each}):
            known = connection.scalar(sa.select(artifacts.c.sha256).where(artifacts.c.sha256 == sha256))
            if known is None:
                row = {"sha256": sha256, "size_bytes": 0, "created_at": created_at}
                connection.execute(artifacts.insert().values(row))
            connection.execute(uses.insert().values(sha256=sha256, run_id=run_id, kind="rows"))


def downgrade() -> None:
    op.execute("DELETE FROM run_artifacts WHERE kind = 'rows'")
    op.drop_table("upload_chunks")
    with op.batch_alter_table("part_uploads", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_part_uploads_touched_at"))
    op.drop_table("part_uploads")
