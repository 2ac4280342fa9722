"""The state of the server's optimizer after a round.

Revision: 0002; after: 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

FOREIGN_KEY = "fk_rounds_server_optimizer_sha256_artifacts"


def upgrade() -> None:
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.add_column(sa.Column("server_optimizer_sha256", sa.String(length=64), nullable=True))
        batch_op.create_foreign_key(op.f(FOREIGN_KEY), "artifacts", ["server_optimizer_sha256"], ["sha256"])


def downgrade() -> None:
    with op.batch_alter_table("rounds", schema=None) as batch_op:
        batch_op.drop_constraint(op.f(FOREIGN_KEY), type_="foreignkey")
        batch_op.drop_column("server_optimizer_sha256")
