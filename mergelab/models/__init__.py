"""What is merged: references, where they come from, heads, and the embedded miniature."""
