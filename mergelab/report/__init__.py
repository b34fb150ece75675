"""What is read afterwards: plots of studies."""
