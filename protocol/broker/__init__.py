"""A live broker, measured before a federation trusts it with its messages."""
