"""Operators' keys, the audit trail, devices' public keys and next credentials, tokens with approval and revocation.

Revision: 0006; after: 0005.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "operator_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=32), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operator_keys")),
        sa.UniqueConstraint("key_sha256", name=op.f("uq_operator_keys_key_sha256")),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=True),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_key_id_sequence"), "audit", ["key_id", "sequence"])
    op.create_index(op.f("ix_audit_subject_sequence"), "audit", ["subject", "sequence"])
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.add_column(sa.Column("next_credential_sha256", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("public_key", sa.String(length=44), nullable=True))
    with op.batch_alter_table("enrolment_tokens", schema=None) as batch_op:
        # The default is for the tokens that are there; new ones say it themselves.
        batch_op.add_column(sa.Column("approval", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.add_column(sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True))
    with op.batch_alter_table("enrolment_tokens", schema=None) as batch_op:
        batch_op.alter_column("approval", server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("enrolment_tokens", schema=None) as batch_op:
        batch_op.drop_column("revoked_at")
        batch_op.drop_column("approval")
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_column("public_key")
        batch_op.drop_column("next_credential_sha256")
    op.drop_table("audit")
    op.drop_table("operator_keys")
