"""Define what a merge method is and run it: registry, parameters, streaming, merge sessions."""
