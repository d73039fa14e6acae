"""One file a version of the schema; each names the one before."""
