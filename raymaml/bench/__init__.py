"""``raymaml bench``: what the gradient methods and other libraries cost on the same episode."""
