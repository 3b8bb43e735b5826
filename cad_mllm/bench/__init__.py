"""How fast a training step is, beside other ways to compute the same one."""
