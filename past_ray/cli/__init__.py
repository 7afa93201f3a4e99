"""The command line, ``past-ray``: parse, call the library, show what came out."""

from past_ray.cli.app import app, main, run_experiment
from past_ray.cli.user_errors import user_errors

__all__ = ["app", "main", "run_experiment", "user_errors"]
