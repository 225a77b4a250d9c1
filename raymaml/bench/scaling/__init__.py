"""How training scales with workers: a model of an outer step, what it is fitted to, and checks."""
