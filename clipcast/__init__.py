"""The front door: the `clipcast` command, and the whole system on one machine. Importing it imports nothing heavy."""

__version__ = "0.1.0"
