"""Supervised fine-tuning as pure functions: examples, masks, schedule and loss."""
