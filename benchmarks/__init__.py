"""Measurements: methods side by side, and (with later work) throughput."""
