"""Releases on the wire: what the coordinator announces, what devices say of it, and the two ends."""
