"""`clipcast serve`: answers over HTTP, for programs and for people."""
