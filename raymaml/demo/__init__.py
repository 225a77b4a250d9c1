"""Demonstrations: small, whole programs on raymaml's public names."""
