"""``python -m past_ray.cli``."""

from past_ray.cli.app import main

main()
