"""Predictions against the truth: files, scores, their summary, and a page to look at."""
