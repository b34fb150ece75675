"""What an experiment needs from the hub, fetched beforehand."""
