"""Fast derivatives of convolution, batch norm and max-pool, forward over reverse."""
