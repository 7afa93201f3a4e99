"""Configuration: pydantic records and their loading. Imports neither torch nor ray."""
