"""An episode through a model: its passes, its losses, and whether the model fits."""
