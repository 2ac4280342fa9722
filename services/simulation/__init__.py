"""Experiments without a network: who holds which rows, what a strategy reached, and what may be said of it.

Imports the method, the data on disk and the protocol; never another service. Nothing here trains: whoever plays the
rounds hands in what it measured (`run_results.RunResult`) and gets back intervals, gates, costs and a report.
"""
