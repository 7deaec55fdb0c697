"""Devices as data: one TOML per board, and which board this is. Standard library and pydantic only."""
