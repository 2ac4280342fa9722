"""Webhooks: servers of the operator's that are told of events."""
