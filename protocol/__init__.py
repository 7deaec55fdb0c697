"""The wire: topics, messages, codec, transfer and bus. Never imports torch."""
