"""Reinforcement learning as pure functions and records: no model, no Ray, no engine."""
