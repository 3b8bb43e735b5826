"""In a container: read what the operator gives, check it, start the ranks, hand their exit code on."""
