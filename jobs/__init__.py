"""Entry points for ``ray job submit``: parse, build, call. Always run as ``python -m jobs.<name>``."""
