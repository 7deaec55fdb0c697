"""One file per sub-command. Heavy imports are inside the functions, so that `clipcast --help` is quick."""
