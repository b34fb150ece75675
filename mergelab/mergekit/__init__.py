"""mergekit's configs: read, translated to a config of this package, and written."""
