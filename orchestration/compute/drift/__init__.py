"""Drift: whether what is served now is what was served before, and what the champion was trained on."""
