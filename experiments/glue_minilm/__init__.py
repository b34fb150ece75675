"""A study on real models and data; see ``__main__``."""
