"""CAD geometry as data. Nothing below this folder imports torch."""
