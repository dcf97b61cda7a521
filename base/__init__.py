"""What every room may import, and what changes no result. No torch."""
