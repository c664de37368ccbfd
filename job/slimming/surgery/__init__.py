"""Surgery: building the narrow network from the wide one, and verifying it."""
