"""The event feed of a run: as a list, and as a stream of server-sent events."""
