"""Who aggregates: the Celery worker that prepares runs and plays the server's side of rounds, and the sweep.

A task is a shell around one stage function; the database says what there is to do, the queue only that there may be
something. Nothing here imports torch at module level but the stages themselves, so that the controller stays small.
"""
