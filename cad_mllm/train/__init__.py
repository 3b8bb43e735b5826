"""Training: distributed set-up, ZeRO, stages, engine, checkpoints, tracking, and the fit loop."""
