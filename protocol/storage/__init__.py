"""What the wire keeps on a disk: whole files, blobs by their hash, what has arrived of one."""
