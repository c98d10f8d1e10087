"""The benchmark suite: a table of cases, the runner that times them beside torch, and the reports.

Imports optim, prune, recipes and report; nothing but the command line and ``benchmarks/`` imports it.
"""
