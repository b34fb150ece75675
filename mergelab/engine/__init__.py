"""What a merge method is and how it runs: registry, parameters, streaming, warm sessions."""
