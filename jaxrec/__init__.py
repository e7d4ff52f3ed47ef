"""jaxrec: a large recommender in JAX, from histories to a ranked catalogue."""

__version__ = "0.1.0"
