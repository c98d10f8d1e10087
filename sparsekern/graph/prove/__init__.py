"""Proving a graph: a smaller copy is traced again and compared with the predictions of the rules."""
