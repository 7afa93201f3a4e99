"""Skill vectors: what RL adds to a fine-tuned model, kept apart and added to other models."""
