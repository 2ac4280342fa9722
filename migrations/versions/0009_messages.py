"""Messages of the server, what it keeps between rounds, and the LLM's tokenizer, as files of versions, rounds and runs.

Revision: 0009; after: 0008.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

COLUMNS = {
    "runs": ("llm_vocabulary_sha256",),
    "rounds": (
        "base_message_sha256",
        "base_server_state_sha256",
        "candidate_message_sha256",
        "candidate_server_state_sha256",
    ),
    "versions": ("message_sha256", "server_state_sha256"),
}


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        with op.batch_alter_table(table, schema=None) as batch_op:
            for column in columns:
                batch_op.add_column(sa.Column(column, sa.String(length=64), nullable=True))
                batch_op.create_foreign_key(op.f(f"fk_{table}_{column}_artifacts"), "artifacts", [column], ["sha256"])


def downgrade() -> None:
    for table, columns in reversed(COLUMNS.items()):
        with op.batch_alter_table(table, schema=None) as batch_op:
            for column in reversed(columns):
                batch_op.drop_constraint(op.f(f"fk_{table}_{column}_artifacts"), type_="foreignkey")
                batch_op.drop_column(column)
