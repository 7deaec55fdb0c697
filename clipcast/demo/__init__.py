"""The whole system on one machine, as real processes talking to a real broker."""
