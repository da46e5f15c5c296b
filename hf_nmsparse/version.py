"""The version of the package, where its own modules can read it: what they import is never the package itself."""

__all__ = ["__version__"]

__version__ = "0.1.0"
