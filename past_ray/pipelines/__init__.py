"""The whole method as named, resumable stages."""
