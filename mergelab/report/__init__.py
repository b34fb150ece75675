"""What is read afterwards: plots, pages and tables that compare runs, model cards."""
