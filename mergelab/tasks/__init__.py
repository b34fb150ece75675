"""What is measured: tasks, their data and labels, metrics, protocols, and how sure a score is."""
