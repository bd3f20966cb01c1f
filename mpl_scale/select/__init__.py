"""Choosing unlabelled images: scores, rules, hashes, and the new index."""
