"""Faults against a real Cotune on 127.0.0.1: kills, cuts, lost messages, a full disk; and what must hold after each.

`python -m benchmarks.chaos` (make chaos). Everything it starts is its own and ends with it: the processes of the
service, a PostgreSQL and a Redis server on free ports, devices, and a proxy that spoils their connections.
"""
