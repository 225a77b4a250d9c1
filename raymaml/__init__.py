"""raymaml: train and judge MAML on one CPU, one GPU or a Ray cluster."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("raymaml")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
