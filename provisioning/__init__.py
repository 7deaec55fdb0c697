"""From a board in its box to a client that takes part: package, overlay, flash plan."""
