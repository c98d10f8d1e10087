"""The benchmark suite: one table of cases, what runs them beside torch, and what shows the figures.

Imports optim, prune, recipes and report; nothing but the command line and ``benchmarks/`` imports it.
"""
