"""What a terminal shows: progress, warnings, tables that fit."""
