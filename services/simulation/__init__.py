"""Experiments without a network: who holds which rows, what a strategy reaches, and what may be said of it.

Imports the method, the data on disk and the protocol; never another service. `experiment` plays rounds with the steps,
seeds and wire forms of a deployment; its results (`run_results.RunResult`) become intervals, gates, costs and a report.
"""
