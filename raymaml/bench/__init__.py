"""``raymaml bench``: gradient methods and other libraries timed on the same episode."""
