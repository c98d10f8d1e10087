"""Tables and figures of runs (``runs``), and of graphs and plans (``tables``, ``picture``)."""
