"""What ``raymaml doctor`` looks at without Ray."""
