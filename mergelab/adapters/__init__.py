"""Adapters: read from the formats of their libraries, brought to one canonical form, and applied to a base."""
