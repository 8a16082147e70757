"""The version of megatrain."""

__version__ = "0.1.0"
