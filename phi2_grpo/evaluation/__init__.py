"""Base against tuned, measured and reported."""
