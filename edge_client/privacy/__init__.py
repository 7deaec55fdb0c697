"""Differential privacy on a device: what may leave it, with how much noise, and what that has cost so far."""
