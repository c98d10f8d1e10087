"""Decisions: criteria that rank channels, allocators that set widths, and the policy of events."""
