"""Sends models out to devices: the journal of releases, their blobs, and the desk that moves them from ring to ring."""
