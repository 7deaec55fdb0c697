"""The Debian package of a client: its files, how it is built, and the wheels that it may carry."""
