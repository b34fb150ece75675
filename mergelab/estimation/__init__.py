"""What methods learn from data: Fisher diagonals, Gram matrices, features, and where they are stored."""
