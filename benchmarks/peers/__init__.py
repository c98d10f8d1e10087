"""sparsekern beside other tools that remove channels: ``python -m benchmarks.peers``."""
