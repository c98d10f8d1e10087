"""What is decided: criteria, widths under a budget, and when."""
