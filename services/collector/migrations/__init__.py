"""The schema's versions, applied when the collector starts."""
