"""Versions at rest: what a checkpoint says it is, and the store that proves it."""
