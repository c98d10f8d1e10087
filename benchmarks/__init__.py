"""What measures time, and what it showed."""
