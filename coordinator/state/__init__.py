"""A federation at rest: the journal, its blobs, and the devices that it knows."""
