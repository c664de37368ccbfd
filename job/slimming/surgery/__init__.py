"""The narrow network, built from the wide one and verified against it."""
