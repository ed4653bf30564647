"""What one entry point does, each a story that reads from top to bottom."""
