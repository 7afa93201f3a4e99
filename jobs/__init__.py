"""Entry points for ``ray job submit``, always run as ``python -m jobs.<name>``."""
