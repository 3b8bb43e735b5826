"""Files -> index of usable samples -> order of the steps -> batches."""
