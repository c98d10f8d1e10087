"""The self-check of a backend: its results on small problems, compared with those of the reference.

The problems, the ops in each setting and the comparisons are also those of the parity tests.
"""
