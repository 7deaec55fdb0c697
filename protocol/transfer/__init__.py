"""Blobs on their way: offer, need, chunks, receipt, in both directions."""
