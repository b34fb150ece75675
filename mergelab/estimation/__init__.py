"""Statistics that methods estimate from data: Fisher diagonals, Gram matrices, features, and their disk cache."""
