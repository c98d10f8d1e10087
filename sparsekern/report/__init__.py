"""What a person sees: of runs (``runs``), of graphs and plans (``tables``, ``picture``)."""
