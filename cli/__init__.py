"""x."""
main=None
