"""Runs: creating, showing and stopping them, and the bytes that they cost."""
