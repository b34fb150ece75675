"""What is typed: overrides, help, version, and the table of a grid."""
