"""Ray Serve applications. Beside ``runtime`` the only package that imports Ray."""
