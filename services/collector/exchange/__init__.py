"""Preferences in and out, as JSON lines in the formats of the field."""
