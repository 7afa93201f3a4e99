"""Ray shells: placement, actors and the training loops over them."""
