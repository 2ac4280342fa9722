"""The client: it answers with the arrays that came, each moved a little.

Flower sends an array again only where the other side has none with the same hash, and an exact echo would cross the
network once for all clients.
"""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Echo, with a weight."""
    moved = 1e-6 * (1 + int(context.node_config["number"]))
    arrays = [array + array.dtype.type(moved) for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 8})})
    return Message(content=content, reply_to=message)
