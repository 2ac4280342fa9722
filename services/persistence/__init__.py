"""What is remembered: tables, the state machines as data, the round's life, and the store of files.

Every function takes the session first and never commits: `Database.transaction` does, once, for the caller. The clock
is passed in. Nothing here imports torch, a web framework or a queue; jobs leave through the outbox (`persistence.jobs`)
and the callable that the process gave to `Database`.

Locks are taken in one order, run, round, device, assignment, job, and the event feed's last, so that no two
transactions can wait for each other.
"""
