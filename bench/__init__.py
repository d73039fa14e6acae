"""Benchmarks: one file each, its peer beside it; the last line printed is one JSON object with the ratios."""
