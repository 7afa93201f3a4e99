"""Settings of all tests."""

from hypothesis import settings

# Tests share their cores with engines: a slow example is no failure.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")
