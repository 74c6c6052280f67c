"""A run's folder: its files, who holds it, what it was made with, and its row in a table."""
