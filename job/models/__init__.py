"""Networks by name, and weights files read without executing anything in them."""
