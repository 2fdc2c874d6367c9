"""The method: student and teacher, losses, centering, EMA."""
