"""Who answers: the HTTP API under `/v1`. No torch here, no query and no decision: endpoints call `persistence`.

Layers: an endpoint declares path, schemas, who may call it and which errors it can answer, and makes one call.
Database work runs in threads and is committed before the answer is sent; what streams (uploads, downloads, events) or
waits (long poll) is asynchronous and holds neither a thread nor a database connection while it waits.
"""
