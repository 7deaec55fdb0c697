"""A device follows releases: fetch, verify, try, keep or go back. Nothing in here imports torch."""
