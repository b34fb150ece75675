"""What is merged: references, hub, heads, vocabularies, encoder–decoders."""
