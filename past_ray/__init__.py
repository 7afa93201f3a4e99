"""past_ray: adapt language models to new documents on Ray and keep their skills."""

__version__ = "0.1.0"
