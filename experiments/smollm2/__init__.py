"""A study on a small language model; see ``__main__``."""
