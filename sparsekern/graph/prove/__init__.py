"""Whether a smaller copy really runs: traced again and compared with what the rules said."""
