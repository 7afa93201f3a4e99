"""Benchmarks and their data: tables, loaders, prompts and graders."""
