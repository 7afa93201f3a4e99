"""Environments that turn a policy's answers into rewards."""
